"""`make check`: audits the packages in requirements.txt for known vulnerabilities, with pip-audit.

Fails on a vulnerability that is not in EXCEPTIONS. If advisories are unavailable (no network, or a package index
without them), it prints a warning and does not fail, because tests must pass offline.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

EXCEPTIONS: dict[str, str] = {}
"""Accepted advisories: id and reason."""
TIMEOUT_S = 120


def main() -> int:
    """Returns the exit code: 1 if there is a finding."""
    ignored = [argument for name in EXCEPTIONS for argument in ("--ignore-vuln", name)]
    command = ["pip-audit", "-r", "requirements.txt", "--no-deps", "--disable-pip", "--format", "json", *ignored]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        print(f"WARNING: nothing was audited: advisories are unavailable ({type(error).__name__})")
        return 0
    findings, unknown = audit_findings(packages)
    for finding in findings:
        print(finding)
    if unknown:
        print(f"WARNING: {len(unknown)} of {len(packages)} packages were not audited: advisories are unavailable")
    print(f"{len(packages) - len(unknown)} packages audited, {len(findings)} findings, {len(EXCEPTIONS)} exceptions")
    return 1 if findings else 0


def audit_findings(packages: Iterable[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """One line for each finding, and the names of packages that were not audited."""
    findings, unknown = [], []
    for package in packages:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for found in package.get("vulns", []):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            findings.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}; `make lock`")
    return findings, unknown


if __name__ == "__main__":
    sys.exit(main())
