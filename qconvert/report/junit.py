"""A report of ``verify`` as JUnit's XML, which systems of continuous integration show."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter

from qconvert import __version__
from qconvert.errors import LINE, printable
from qconvert.report.verify import Check, VerifiedTensor, VerifyReport

CHECKS, TENSORS = "qconvert.verify", "qconvert.verify.tensors"


def junit_xml(report: VerifyReport) -> bytes:
    """A test case for each check, for each tensor that fails one, and for the warnings.

    Names come from files: what XML has no place for, or would drive a terminal, is escaped.
    """
    suite = ET.Element("testsuite", name=printable(report.path, LINE))
    properties = ET.SubElement(suite, "properties")
    for name, value in (("qconvert", __version__), ("verdict", report.headline)):
        ET.SubElement(properties, "property", name=name, value=printable(value, LINE))
    seen: Counter[str] = Counter()
    for check in report.checks:
        seen[check.id] += 1
        again = f" ({seen[check.id]})" if seen[check.id] > 1 else ""
        _check(ET.SubElement(suite, "testcase", classname=CHECKS, name=check.id + again), check)
    for tensor in report.tensors:
        if tensor.fails:
            name = printable(tensor.name, LINE)
            _tensor(ET.SubElement(suite, "testcase", classname=TENSORS, name=name), tensor)
    if report.warnings:
        case = ET.SubElement(suite, "testcase", classname=CHECKS, name="warnings")
        told = "\n".join(printable(w, LINE) for w in report.warnings)
        if report.status == "fail" and not report.failed:  # under --strict
            _failure(case, "warnings", "under --strict a warning is a failure", told)
        else:
            ET.SubElement(case, "system-out").text = told
    counts = {
        "tests": len(suite.findall("testcase")),
        "failures": len(suite.findall("testcase/failure")),
        "skipped": len(suite.findall("testcase/skipped")),
        "errors": 0,
    }
    root = ET.Element("testsuites", name="qconvert verify")
    for element in (root, suite):
        for key, count in counts.items():
            element.set(key, str(count))
    root.append(suite)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _check(case: ET.Element, check: Check) -> None:
    detail = printable(check.detail, LINE)
    if check.worst is not None and check.limit is not None:
        detail += f": {check.worst:.6g} (limit {check.limit:.6g})"
    if check.status == "skip":
        ET.SubElement(case, "skipped", message=detail)
    elif check.status == "fail":
        _failure(case, check.id, detail, printable(check.tensor or "", LINE))
    else:
        ET.SubElement(case, "system-out").text = detail


def _tensor(case: ET.Element, tensor: VerifiedTensor) -> None:
    figure = "" if tensor.sqnr_db is None else f" with {tensor.sqnr_db:.2f} dB"
    message = f"{', '.join(tensor.fails)}: {printable(tensor.stored)}{figure}"
    hint = f"quantize again with {tensor.remedy}" if tensor.remedy else ""
    _failure(case, tensor.fails[0], message, printable(hint, LINE))


def _failure(case: ET.Element, kind: str, message: str, text: str) -> None:
    ET.SubElement(case, "failure", type=kind, message=message).text = text or None
