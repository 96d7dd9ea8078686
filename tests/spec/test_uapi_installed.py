"""The kernel headers installed on this machine as a further witness, for the structures and numbers they contain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.spec.uapi import BEYOND_6_12, LAYOUTS, NUMBERS, member

COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADERS = ["linux/kvm.h", "linux/kvm_para.h", "linux/psp-sev.h"]
UNION = 32
"""Where the parts of `kvm_run` begin."""
YOUNG = {("kvm_run.hypercall", "flags")}
"""Fields that an older header has under another name."""


@pytest.fixture(scope="module")
def installed() -> str:
    """The headers with everything that they define, preprocessed."""
    if not COMPILER:
        pytest.skip("no C compiler on this machine")
    done = subprocess.run(
        [COMPILER, "-E", "-dD", "-x", "c", "-"], input=_includes(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no kernel headers (linux-libc-dev) on this machine")
    return done.stdout


def _includes() -> str:
    return "".join(f"#include <{name}>\n" for name in HEADERS)


def evaluate(expressions: list[str], directory: Path) -> list[int]:
    """What C makes of integer expressions."""
    assert COMPILER
    lines = "".join(f'printf("%lld\\n", (long long)({each}));\n' for each in expressions)
    source = f"#include <stddef.h>\n#include <stdio.h>\n{_includes()}int main(void) {{\n{lines}return 0;\n}}\n"
    program = directory / "probe"
    subprocess.run([COMPILER, "-x", "c", "-o", program, "-"], input=source, text=True, check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in output.split()]


def test_numbers(installed: str, tmp_path: Path) -> None:
    names = sorted(name for name in NUMBERS.keys() - BEYOND_6_12 if re.search(rf"\b{name}\b(?!\()", installed))
    assert len(names) > 100
    assert {"KVM_RUN", "KVM_GET_MSRS", "KVM_SEV_SEND_CANCEL", "SEV_GET_ID2", "KVM_MP_STATE_HALTED"} <= set(names)
    assert dict(zip(names, evaluate(names, tmp_path), strict=True)) == {name: NUMBERS[name] for name in names}


def test_structures(installed: str, tmp_path: Path) -> None:
    expressions: list[str] = []
    expected: list[tuple[str, int]] = []
    for layout in LAYOUTS:
        struct, _, part = layout.name.partition(".")
        if not _has(installed, struct, part):
            continue
        prefix, start = (f"{part}.", UNION) if part else ("", 0)
        size = f"sizeof(((struct {struct} *)0)->{part})" if part else f"sizeof(struct {struct})"
        expressions.append(size)
        expected.append((layout.name, layout.size))
        for name, field in layout.fields.items():
            if field.kind == "bits" or (layout.name, name) in YOUNG:
                continue
            theirs, index = member(layout, name)
            path = f"{prefix}{theirs}" + (f"[{index}]" if index is not None else "")
            expressions += [f"offsetof(struct {struct}, {path})", f"sizeof(((struct {struct} *)0)->{path})"]
            expected += [(f"{layout.name}.{name}", start + field.offset), (f"{layout.name}.{name}", field.size)]
    named = {name for name, _ in expected}
    assert {"kvm_sregs", "kvm_xcrs", "kvm_cpuid_entry2", "kvm_run.msr", "kvm_sev_send_start", "sev_issue_cmd"} <= named
    found = evaluate(expressions, tmp_path)
    assert [(name, value) for (name, _), value in zip(expected, found, strict=True)] == expected


def _has(text: str, struct: str, part: str) -> bool:
    """Whether the headers have a structure, or a member of `kvm_run` of that name."""
    body = re.search(rf"struct {struct} {{(.*?)\n}}", text, re.DOTALL)
    return body is not None and (not part or re.search(rf"}} {part};", body[1]) is not None)
