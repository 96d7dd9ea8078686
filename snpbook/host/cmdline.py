"""The kernel command line, read as Linux reads it: what it does not know it passes on, what it cannot read it tells.

Options of `iommu` are matched by their beginning and unknown ones ignored in silence, those of `amd_iommu` told.
Sources: Linux lib/cmdline.c (next_arg), init/main.c, arch/x86/kernel/pci-dma.c, drivers/iommu/iommu.c,
drivers/iommu/amd/init.c, arch/x86/mm/mem_encrypt_identity.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from snpbook.spec.bring_up import MALFORMED_OPTION, UNKNOWN_AMD_IOMMU, UNKNOWN_PARAMETERS
from snpbook.spec.kernel_parameters import AMD_IOMMU_OPTIONS, KERNEL_PARAMETERS

Word = tuple[str, str | None]
"""A parameter and its value, None where it has none."""
_WORD = re.compile(r'(?:"[^"]*"?|[^\s"])+')


@dataclass(frozen=True, slots=True)
class Cmdline:
    """A command line: `text` and its `words`, what follows from them, and the kernel's `complaints` in order."""

    text: str
    words: tuple[Word, ...]
    no_iommu: bool = False
    passthrough: bool = False
    domain_chosen: bool = False
    """Whether it says how devices are mapped by default, whichever way."""
    amd_iommu_off: bool = False
    v2_tables: bool = False
    sme: bool = False
    """`mem_encrypt=on`: the host encrypts its own memory. SNP guests do not need it."""
    complaints: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Cmdline:
        """Read a command line; nothing in it is an error."""
        line = cls(text, words(text))
        for name, value in line.words:
            match _same(name), value:
                case (("iommu" | "iommu.passthrough"), None):
                    line = line._complain(MALFORMED_OPTION.format(name=name))
                case "iommu", str(options):
                    line = line._iommu(options)
                case "iommu.passthrough", str(given):
                    chosen = boolean(given)
                    if chosen is None:
                        line = line._complain(MALFORMED_OPTION.format(name=name))
                    else:
                        line = replace(line, passthrough=chosen, domain_chosen=True)
                case "amd_iommu", str(options):
                    line = line._amd_iommu(options)
                case "mem_encrypt", given:
                    line = replace(line, sme=given == "on")
        unknown = [word for word in line.words if _same(word[0]) not in KERNEL_PARAMETERS and "." not in word[0]]
        if unknown:  # plain words first: they become arguments of init, the others its environment
            ordered = sorted(unknown, key=lambda word: word[1] is not None)
            names = " ".join(name if value is None else f"{name}={value}" for name, value in ordered)
            line = line._complain(UNKNOWN_PARAMETERS.format(names=names))
        return line

    def module(self, name: str) -> tuple[Word, ...]:
        """The parameters of a module: `kvm_amd.sev=0` is ("sev", "0") of kvm_amd."""
        split = ((_same(full).partition("."), value) for full, value in self.words)
        return tuple((own, value) for (module, _, own), value in split if own and module == name)

    def _complain(self, line: str) -> Cmdline:
        return replace(self, complaints=(*self.complaints, line))

    def _iommu(self, options: str) -> Cmdline:
        line = self
        for option in options.split(","):
            if option.startswith("off"):
                line = replace(line, no_iommu=True)
            elif option.startswith("pt"):
                line = replace(line, passthrough=True, domain_chosen=True)
            elif option.startswith("nopt"):
                line = replace(line, passthrough=False, domain_chosen=True)
        return line

    def _amd_iommu(self, options: str) -> Cmdline:
        line = self
        for option in filter(None, options.split(",")):
            known = next((known for known in AMD_IOMMU_OPTIONS if option.startswith(known)), None)
            match known:
                case None:
                    line = line._complain(UNKNOWN_AMD_IOMMU.format(option=option))
                case "off":
                    line = replace(line, amd_iommu_off=True)
                case "pgtbl_v1" | "pgtbl_v2":
                    line = replace(line, v2_tables=known == "pgtbl_v2")
        return line


def words(text: str) -> tuple[Word, ...]:
    """The words of a command line up to `--`; quotes keep blanks together and are taken off."""
    found: list[Word] = []
    for word in _WORD.findall(text):
        name, equals, value = word.partition("=")
        if word == "--":
            break
        found.append((name.replace('"', ""), value.replace('"', "") if equals else None))
    return tuple(found)


def boolean(text: str) -> bool | None:
    """A truth value as kstrtobool reads it, by its first letter; None for what is none."""
    match text[:1].lower(), text[1:2].lower():
        case ("y" | "t" | "1", _) | ("o", "n"):
            return True
        case ("n" | "f" | "0", _) | ("o", "f"):
            return False
    return None


def _same(name: str) -> str:
    """Names of parameters are the same with dashes and with underscores."""
    return name.replace("-", "_")
