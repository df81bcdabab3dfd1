"""Safe XML parsing for the formats that need it: COLLADA and 3MF."""

import numpy as np
from lxml import etree

from tasks.mesh import MeshRejectedError

MAX_DEPTH = 200  # nodes inside nodes; instances of a node inside itself have no end


def parse_xml(data: bytes) -> etree._Element:
    """Return the root of an XML document; rejects document types, entities and network access."""
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        if "<!DOCTYPE".encode(encoding) in data or "<!ENTITY".encode(encoding) in data:
            detail = "a document type declaration; remove it"
            raise MeshRejectedError("xml_entity_expansion", detail)
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=True,
        remove_comments=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        ended = "Premature end" in str(error) or "EndTag" in str(error)
        raise MeshRejectedError("truncated" if ended else "malformed", str(error)) from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise MeshRejectedError("xml_entity_expansion", "a document type declaration")
    return root


def numbers(text: str | None, dtype: type = float) -> np.ndarray:
    """Parse the numbers of an XML text node."""
    return np.array((text or "").split(), dtype=dtype)


def local(element: etree._Element) -> str:
    """Return an element's name without its namespace."""
    return etree.QName(element).localname


def target(element: etree._Element, attribute: str) -> str:
    """Return the id that an attribute like `#id` means."""
    return (element.get(attribute) or "").removeprefix("#")
