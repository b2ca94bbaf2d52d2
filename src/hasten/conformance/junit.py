"""Results as the XML that continuous integration reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from hasten.conformance.suite import Result

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(results: Sequence[Result], *, strict: bool = False) -> bytes:
    """Write results as a JUnit file: a group is a suite; what is only recommended is a skip unless ``strict``."""
    root = Element("testsuites", name="hasten conformance")
    for group in dict.fromkeys(result.check.group for result in results):
        own = [result for result in results if result.check.group == group]
        suite = SubElement(root, "testsuite", name=group, tests=str(len(own)))
        suite.set("failures", str(sum(_fails(result, strict) for result in own)))
        suite.set("skipped", str(sum(result.outcome != "met" and not _fails(result, strict) for result in own)))
        for result in own:
            case = SubElement(suite, "testcase", name=result.check.name, classname=f"conformance.{group}")
            case.set("time", f"{result.seconds:.3f}")
            if result.outcome != "met":
                word = "failure" if _fails(result, strict) else "skipped"
                text = _NO_XML.sub("?", f"{result.outcome} ({result.check.level}): {result.says}")
                SubElement(case, word, message=text).text = result.check.text
    indent(root)
    done: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return done


def _fails(result: Result, strict: bool) -> bool:
    return result.outcome == "not met" and (strict or result.check.level != "recommended")
