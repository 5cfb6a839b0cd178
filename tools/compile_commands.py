"""Writes compile_commands.json, from which clangd learns how each source is compiled.

Asks Bazel for the compile actions of every target (it need not have built them) and makes the
paths of external repositories absolute, since Bazel compiles in a folder of its own.
"""

import json
import os
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GCC_ONLY = {"-fno-canonical-system-headers", "-Wno-free-nonheap-object"}


def bazel(*args):
    command = ["bazel", *args, "--noshow_progress", "--ui_event_filters=-info"]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    external = os.path.join(bazel("info", "output_base").strip(), "external") + "/"
    query = 'mnemonic("CppCompile", //...)'
    actions = json.loads(bazel("aquery", "--output=jsonproto", query)).get("actions", [])

    commands = {}
    for action in actions:
        arguments = [a for a in action["arguments"] if a not in GCC_ONLY]
        source = arguments[arguments.index("-c") + 1]
        if source.startswith(("external/", "bazel-out/")):
            continue
        arguments = [external + a[9:] if a.startswith("external/") else a for a in arguments]
        commands[source] = {"directory": ROOT, "file": source, "arguments": arguments}

    path = os.path.join(ROOT, "compile_commands.json")
    with open(path, "w") as out:
        json.dump([commands[source] for source in sorted(commands)], out, indent=1)
    print(f"compile_commands.json: {len(commands)} sources")


if __name__ == "__main__":
    main()
