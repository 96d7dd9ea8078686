"""Whole launches on machines of their own: each system call with what happened inside, and the digest's chain.

A launch is told by its differences from a small SNP guest: properties, vCPUs, command line, or a host that adds the
sections in another order. What is expected of it is read off the firmware, never written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import DirectBoot
from snpbook.host.vmm.guest import Vmm
from snpbook.spec.image import Image, SectionType
from snpbook.spec.pages import PAGE_SHIFT, LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY, guest_policy
from snpbook.system import System, sample_image
from snpbook.trace import Event, FirmwareCommand, Instruction, Ioctl, SystemCall
from snpbook.views.launch_steps import Call, Link

INSTALLED = 128 << 20
ADDED = "SNP_LAUNCH_UPDATE"


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """A launch by what it is made of. `swapped` adds two sections, by their numbers, in each other's place."""

    kind: str = "snp"
    era: str = "mainline"
    memory: str = "12 MiB"
    vcpus: int = 2
    cpu: str = "EPYC-Milan"
    cmdline: str = "console=ttyS0"
    swapped: tuple[int, int] | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)

    def image(self) -> Image:
        """The image, its sections in the order in which the host adds them."""
        image = sample_image()
        if self.swapped is None:
            return image
        order = list(image.metadata)
        one, other = self.swapped
        order[one], order[other] = order[other], order[one]
        return replace(image, metadata=tuple(order))


class Launch:
    """A launch from the VMM's first call to its last: `calls`, and for an SNP guest the `links` of its digest.

    `failure` is the refusal that ended it early, if one did.
    """

    def __init__(self, options: LaunchOptions, seed: str = "launch") -> None:
        self.options = options
        self.system = System("milan", seed, installed=INSTALLED)
        self.system.host.boot(options.era, modules={"kvm_amd": "debug_swap=1"})
        self.calls: list[Call] = []
        self.links: list[Link] = []
        self.failure: KernelError | ValueError | None = None
        self._inside: list[Event] = []
        self._gctx, self.image = 0, options.image()
        self.vmm: Vmm | None = None
        forget = self.system.trace.subscribe(self._follow)
        try:
            self._run()
        except (KernelError, ValueError) as error:
            self.failure = error
        finally:
            forget()

    def __repr__(self) -> str:
        end = (
            f"refused: {self.failure}" if self.failure else f"digest {self.digest.hex()[:12]}" if self.links else "done"
        )
        return f"Launch({self.options.kind}, {len(self.calls)} calls, {end})"

    @property
    def digest(self) -> bytes:
        """The launch digest at the end; empty where there is none."""
        return self.links[-1].digest if self.links else b""

    def _run(self) -> None:
        options = self.options
        boot = DirectBoot(b"a kernel", b"an initrd", options.cmdline) if options.kind != "plain" else None
        guest = self.system.create_vm(
            kind=options.kind, memory=options.memory, vcpus=options.vcpus, image=self.image, boot=boot,
            vcpu_type=options.cpu, **options.properties,
        )  # fmt: skip
        self.vmm = guest.vmm
        guest.launch()

    def _follow(self, event: Event) -> None:
        match event:
            case Ioctl() | SystemCall():
                self.calls.append(Call(event, tuple(self._inside), self.digest))
                self._inside.clear()
            case FirmwareCommand():
                self._inside.append(event)
                self._gctx = event.arguments.get("gctx_paddr", self._gctx)
                if event.name == ADDED and event.pages is not None:
                    self._add_link(event)
            case Instruction(actor="host"):
                self._inside.append(event)

    def _add_link(self, event: FirmwareCommand) -> None:
        assert event.pages is not None
        kind, first = event.arguments["page_type"], int(event.pages[0])
        gpa = self.system.machine.rmp.entry(first).gfn << PAGE_SHIFT
        digest: bytes = self.system.processor.context(self._gctx).launch_digest
        self.links.append(Link(self._name(kind, gpa), kind, gpa, len(event.pages), digest))

    def _name(self, kind: LaunchPage, gpa: int) -> str:
        if kind is LaunchPage.VMSA:
            return f"VMSA of vCPU {sum(link.kind is LaunchPage.VMSA for link in self.links)}"
        if gpa == self.image.gpa:
            return "firmware image"
        section = next(each for each in self.image.sections if each.gpa == gpa)
        if section.type is SectionType.SEC_MEM:
            return f"memory at {gpa:#x}"
        return section.type.name.replace("_", " ").replace("KERNEL HASHES", "kernel hashes")


def parting(one: Launch, other: Launch) -> str:
    """The first link at which two launches part, by its name in `one`, or in the longer one; "nowhere" for none."""
    for mine, theirs in zip(one.links, other.links, strict=False):
        if mine.digest != theirs.digest:
            return mine.name
    longer = max(one.links, other.links, key=len)
    shorter = min(len(one.links), len(other.links))
    return longer[shorter].name if len(longer) > shorter else "nowhere"


_DEBUG = int.from_bytes(bytes(guest_policy(DEFAULT_POLICY).replace(debug=1)), "little")
CHANGES: Mapping[str, LaunchOptions] = {
    "a third vCPU": LaunchOptions(vcpus=3),
    "another command line": LaunchOptions(cmdline="console=ttyS0 debug"),
    "features: debug-swap=on": LaunchOptions(properties={"debug_swap": True}),
    "the host swaps two sections": LaunchOptions(swapped=(1, 2)),
    "another vCPU model": LaunchOptions(cpu="EPYC-Rome"),
    "no kernel hashes": LaunchOptions(properties={"kernel_hashes": False}),
    "another policy": LaunchOptions(properties={"policy": _DEBUG}),
    "other host data": LaunchOptions(properties={"host_data": b"h" * 32}),
    "more memory": LaunchOptions(memory="16 MiB"),
}
"""What may differ between two launches, by what it is called."""
