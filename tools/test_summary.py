"""Counts the test cases of a `bazel test` run and prints "N passed, N failed" as its last line.

Reads the build event file (--build_event_json_file) for the targets and how each fared, and each
target's test.xml for its test cases (tests/main.cc writes it). A target that did not build, crashed
or ran out of time counts as one failed test case unless its own list shows one. Exits 0 only if
something passed and nothing failed.
"""

import argparse
import json
import urllib.parse
import xml.etree.ElementTree as ElementTree


def read_events(path):
    with open(path) as events:
        return [json.loads(line) for line in events if line.strip()]


def count_cases(xml_paths):
    """Returns (passed, names of the failed) over the last attempt of each shard."""
    passed, failed = 0, []
    for path in xml_paths:
        try:
            cases = list(ElementTree.parse(path).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            continue  # the target's own status tells
        for case in cases:
            if case.find("failure") is None and case.find("error") is None:
                passed += 1
            else:
                failed.append(case.get("name"))
    return passed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events")
    parser.add_argument("--bazel-status", type=int, required=True)
    args = parser.parse_args()

    asked, xml, status = set(), {}, {}
    for event in read_events(args.events):
        key = event["id"]
        if "targetConfigured" in key and event.get("configured", {}).get("testSize"):
            asked.add(key["targetConfigured"]["label"])
        elif "testResult" in key:
            attempt = key["testResult"]
            for output in event["testResult"].get("testActionOutput", []):
                if output["name"] == "test.xml":
                    path = urllib.parse.unquote(urllib.parse.urlparse(output["uri"]).path)
                    shard = (attempt.get("run"), attempt.get("shard"))
                    xml.setdefault(attempt["label"], {})[shard] = path
        elif "testSummary" in key:
            status[key["testSummary"]["label"]] = event["testSummary"]["overallStatus"]

    passed, failed = 0, []
    for label in sorted(asked | set(status)):
        target_passed, target_failed = count_cases(xml.get(label, {}).values())
        outcome = status.get(label, "FAILED TO BUILD")
        if outcome not in ("PASSED", "FLAKY") and not target_failed:
            target_failed.append(outcome.lower().replace("_", " "))
        passed += target_passed
        failed += [f"{label}: {name}" for name in target_failed]

    if args.bazel_status not in (0, 3, 4) and not failed:  # 3: tests failed, 4: no tests
        failed.append(f"bazel test ended with status {args.bazel_status}")
    for name in failed:
        print(f"FAILED {name}")
    print(f"{passed} passed, {len(failed)} failed")
    raise SystemExit(0 if passed and not failed else 1)


if __name__ == "__main__":
    main()
