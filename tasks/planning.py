"""The plan of a refresh: what is new, changed, stale or gone, and why, before any work.

A data folder mirrors its configuration: its newest version holds what the configured sources hold,
at the configured resolutions, and nothing else. Old versions keep what they held.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from tasks.catalogue import Key, Row
from tasks.shards import ASSETS_FILE, sdf_file

Action = Literal["new", "changed", "stale", "retry", "staged", "relabelled", "gone", "unchanged"]
PASSING = ("gone", "changed")  # rejections by a source whose file moved while it was being read
WORK: tuple[Action, ...] = ("new", "changed", "stale", "retry")


@dataclass(frozen=True)
class Wanted:
    """An asset as the source has it now. uris: every place where these bytes are, sorted."""

    asset_id: str
    uris: tuple[str, ...]
    source: str
    licence: str
    attribution: str
    category: str
    split: str


@dataclass(frozen=True)
class Entry:
    """What a refresh will do with one row, and why."""

    action: Action
    asset_id: str
    resolution: int
    uri: str
    reason: str

    @property
    def key(self) -> Key:
        """Key of the row."""
        return self.asset_id, self.resolution


@dataclass(frozen=True)
class Plan:
    """What a refresh will do, row by row."""

    entries: tuple[Entry, ...]

    def of(self, *actions: Action) -> list[Entry]:
        """Return the entries with one of these actions."""
        return [entry for entry in self.entries if entry.action in actions]

    def counts(self) -> dict[str, int]:
        """Return the number of rows by action, in the order of `Action`; zeros left out."""
        counter = Counter(entry.action for entry in self.entries)
        return {action: counter[action] for action in get_args(Action) if counter[action]}

    def table(self, examples: int = 3) -> str:
        """Return the plan as text: rows by action and reason, with some examples of each."""
        groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for action in get_args(Action):
            for entry in self.of(action):
                groups[action, entry.reason].append(entry)
        lines = [f"{'action':<12}{'rows':>8}  why"]
        for (action, reason), entries in groups.items():
            lines.append(f"{action:<12}{len(entries):>8}  {reason}")
            if action == "unchanged":
                continue
            lines += [f"{'':<22}{e.uri} at {e.resolution}" for e in entries[:examples]]
            if len(entries) > examples:
                lines.append(f"{'':<22}and {len(entries) - examples} more")
        return "\n".join(lines)


def plan(
    rows: Sequence[Row],
    wanted: Sequence[Wanted],
    recipes: Mapping[int, str],
    limits: str,
    *,
    retry_failed: bool = False,
    staged: Mapping[Key, Row] | None = None,
    files: Iterable[str] = (),
) -> Plan:
    """Say what separates a catalogue's rows from what the source and the configuration ask for.

    recipes: the recipe by resolution; rows at other resolutions go. limits: time and memory of the
    work; failed rows are tried again under other limits. staged: outcomes of a refresh that did
    not reach its commit. files: what is there under shards/.
    """
    here = {row.key: row for row in rows}
    previous = {uri: row.asset_id for row in rows for uri in row.uris}
    known = {row.asset_id for row in rows}
    staged, present = staged or {}, set(files)
    entries = []
    for asset in wanted:
        replaced = next((previous[u] for u in asset.uris if u in previous), asset.asset_id)
        for resolution, recipe in recipes.items():
            key = asset.asset_id, resolution
            row, ready = here.get(key), staged.get(key)
            action: Action
            if row is not None:
                action, reason = _judge(row, asset, recipe, limits, retry_failed, present)
            elif asset.asset_id in known:
                action, reason = "new", f"not yet at resolution {resolution}"
            elif replaced != asset.asset_id:
                action, reason = "changed", "other content than before at this place"
            else:
                action, reason = "new", "not in the catalogue"
            if action in WORK and ready is not None and ready.recipe == recipe:
                again = ready.status == "failed" and (retry_failed or ready.limits != limits)
                if not again and _missing(ready, present) is None:
                    action, reason = "staged", "finished by a refresh that was interrupted"
            entries.append(Entry(action, *key, asset.uris[0], reason))
    ids = {asset.asset_id for asset in wanted}
    places = {uri for asset in wanted for uri in asset.uris}
    for row in rows:
        if row.asset_id in ids and row.resolution in recipes:
            continue
        if row.asset_id in ids:
            reason = f"resolution {row.resolution} is not asked for"
        elif places.isdisjoint(row.uris):
            reason = "no longer in the source"
        else:
            reason = "its place holds other content now"
        entries.append(Entry("gone", row.asset_id, row.resolution, row.uris[0], reason))
    return Plan(tuple(entries))


def _judge(
    row: Row, asset: Wanted, recipe: str, limits: str, retry_failed: bool, present: set[str]
) -> tuple[Action, str]:
    """Return what to do with a row whose asset the source has, and why."""
    if row.recipe != recipe:
        return "stale", _difference(row.recipe, recipe)
    missing = _missing(row, present)
    if missing is not None:
        return "stale", f"{missing} is missing"
    if row.reason in PASSING:
        return "retry", f"could not be read before ({row.reason})"
    if row.status == "failed" and retry_failed:
        return "retry", f"failed before ({row.reason})"
    if row.status == "failed" and row.limits != limits:
        return "retry", f"failed before ({row.reason}) within {row.limits}, now {limits}"
    labels = [n for n in asdict(asset) if getattr(row, n) != getattr(asset, n)]
    if labels:
        return "relabelled", f"other {', '.join(labels)}"
    return "unchanged", row.status + (f" ({row.reason})" if row.reason else "")


def _missing(row: Row, present: set[str]) -> str | None:
    if row.status != "ready":
        return None
    files = (f"{row.shard}/{sdf_file(row.resolution)}", f"{row.shard}/{ASSETS_FILE}")
    return next((f"shards/{file}" for file in files if file not in present), None)


def _difference(old: str, new: str) -> str:
    """Say which of the `name=value` words of two recipes differ."""
    before, after = (dict(word.split("=", 1) for word in text.split()) for text in (old, new))
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return ", ".join(f"{n} {before.get(n, 'none')} -> {after.get(n, 'none')}" for n in names)
