"""A tolerance that the compiled path shares with the kernels, without importing torch."""

# Squared area over fourth power of the longest edge, under which a triangle counts as its edges:
# barycentric coordinates of thinner ones are noise.
SLIVER = 1e-12
