"""The object that makes a guest confidential: QEMU's `sev-guest` and `sev-snp-guest`, property by property.

`PROPERTIES` says which object has a property, what its text looks like, and which tree of QEMU it comes from; parser,
printer and checks follow it. Sources: QEMU 10 qapi/qom.json, target/i386/sev.c; AMD's development trees (unconfirmed).
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto

from snpbook.host.vmm.configuration import GuestKind, VmmError
from snpbook.spec.eras import Era, PrivateFile
from snpbook.spec.launch import ID_AUTH, ID_BLOCK
from snpbook.spec.policy import DEFAULT_LEGACY_POLICY, DEFAULT_POLICY, LEGACY_POLICY_ES
from snpbook.spec.qemu import DEFAULT_REDUCED_PHYS_BITS, HOST_DATA_SIZE, SEV_DEVICE, WORKAROUNDS_SIZE
from snpbook.spec.sev_features import INJECTION_MODES, SevFeatures
from snpbook.spec.uapi_sev import SevOp

SEV_GUEST, SNP_GUEST = "sev-guest", "sev-snp-guest"
_BOTH = frozenset({SEV_GUEST, SNP_GUEST})
_SEV, _SNP = frozenset({SEV_GUEST}), frozenset({SNP_GUEST})


class Text(Enum):
    """How the text of a property is read."""

    WORD = auto()
    UINT32 = auto()
    UINT64 = auto()
    ON_OFF = auto()
    BASE64 = auto()
    DISCARD = auto()


class Tree(Enum):
    """Whose QEMU has a property."""

    QEMU = "QEMU"
    V7 = "QEMU of series v7"
    AMD = "AMD's QEMU"
    LATER = "QEMU after 10.1"
    SVSM = "a QEMU for SVSM hosts"


@dataclass(frozen=True, slots=True)
class Property:
    """A property by QEMU's name: the objects that have it, its text, where it comes from, what it means."""

    name: str
    objects: frozenset[str]
    text: Text
    meaning: str
    tree: Tree = Tree.QEMU

    @property
    def field(self) -> str:
        """The name of the value in `SevObject`."""
        return self.name.replace("-", "_")


PROPERTIES: Mapping[str, Property] = {
    each.name: each
    for each in (
        Property("sev-device", _BOTH, Text.WORD, "the file through which firmware commands go"),
        Property("cbitpos", _BOTH, Text.UINT32, "the guest address bit that says encrypted: must be the host's"),
        Property("reduced-phys-bits", _BOTH, Text.UINT32, "physical address bits that encryption takes: 1 to 63"),
        Property("kernel-hashes", _BOTH, Text.ON_OFF, "measure kernel, initrd and command line"),
        Property("policy", _BOTH, Text.UINT64, "what the owner demands, kept by the firmware"),
        Property("handle", _SEV, Text.UINT32, "0, or the guest whose key is shared"),
        Property("dh-cert-file", _SEV, Text.WORD, "the owner's Diffie-Hellman certificate, in base64"),
        Property("session-file", _SEV, Text.WORD, "the owner's session keys for the firmware, in base64"),
        Property("legacy-vm-type", _SEV, Text.ON_OFF, "KVM_SEV_INIT or ES_INIT in place of KVM_SEV_INIT2"),
        Property("guest-visible-workarounds", _SNP, Text.BASE64, "GOSVW, which the secrets page tells the guest"),
        Property("id-block", _SNP, Text.BASE64, "the digest, ids and policy that the owner expects"),
        Property("id-auth", _SNP, Text.BASE64, "keys and signatures over the ID block"),
        Property("author-key-enabled", _SNP, Text.ON_OFF, "the author's key signs the ID key"),
        Property("host-data", _SNP, Text.BASE64, "32 bytes of the host's, in every report"),
        Property("vcek-disabled", _SNP, Text.ON_OFF, "the guest's reports are not signed by a VCEK"),
        Property("upm-mode", _BOTH, Text.ON_OFF, "private memory comes from a restricted file", Tree.V7),
        Property("init-flags", _SNP, Text.UINT64, "flags of KVM_SNP_INIT", Tree.V7),
        Property(
            "debug-swap", _BOTH, Text.ON_OFF, "debug registers are the guest's own (SEV_FEATURES bit 5)", Tree.LATER
        ),
        Property("restricted-injection", _SNP, Text.ON_OFF, "only #HV is injected (SEV_FEATURES bit 3)", Tree.SVSM),
        Property("alternate-injection", _SNP, Text.ON_OFF, "a VMPL above injects (SEV_FEATURES bit 4)", Tree.SVSM),
        Property("discard", _BOTH, Text.DISCARD, "whether a conversion frees the side that is left", Tree.AMD),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SevObject:
    """A `sev-guest` or `sev-snp-guest` by its properties; blobs decoded, files by their names.

    `cbitpos` None takes the host's; `upm_mode` and `discard` None leave it to the kernel and the VMM. `VmmError`
    names a property whose value cannot be, or that the object does not have.
    """

    kind: GuestKind
    policy: int
    sev_device: str = SEV_DEVICE
    cbitpos: int | None = None
    reduced_phys_bits: int = DEFAULT_REDUCED_PHYS_BITS
    kernel_hashes: bool = False
    handle: int = 0
    dh_cert_file: str = ""
    session_file: str = ""
    legacy_vm_type: bool = False
    guest_visible_workarounds: bytes = b""
    id_block: bytes = b""
    id_auth: bytes = b""
    author_key_enabled: bool = False
    host_data: bytes = b""
    vcek_disabled: bool = False
    upm_mode: bool | None = None
    init_flags: int = 0
    debug_swap: bool = False
    restricted_injection: bool = False
    alternate_injection: bool = False
    discard: bool | None = None

    def __post_init__(self) -> None:
        for name, exact, limit in (
            ("guest_visible_workarounds", 0, WORKAROUNDS_SIZE),
            ("id_block", ID_BLOCK.size, ID_BLOCK.size),
            ("id_auth", 0, ID_AUTH.size),
            ("host_data", HOST_DATA_SIZE, HOST_DATA_SIZE),
        ):
            size = len(getattr(self, name))
            if size and exact and size != exact:
                raise VmmError(f"{_dashed(name)}: parameter length of {size} not equal to {exact}")
            if size > limit:
                raise VmmError(f"{_dashed(name)}: parameter length of {size} exceeds max of {limit}")
        for name in self.given:
            if self.type not in PROPERTIES[name].objects:
                raise VmmError(f"Property '{self.type}.{name}' not found")
        if self.kind is not GuestKind.SNP and bool(self.policy & LEGACY_POLICY_ES) != (self.kind is GuestKind.SEV_ES):
            wanted = "set" if self.kind is GuestKind.SEV_ES else "clear"
            raise VmmError(f"policy {self.policy:#x}: bit 2, which makes a SEV-ES guest, is {wanted} for {self.kind}")
        if self.kind is GuestKind.SNP and self.upm_mode is False:
            raise VmmError("upm-mode=off: an SNP guest has no memory without private memory")

    def __repr__(self) -> str:
        values = (
            f"{name}={print_property(PROPERTIES[name], getattr(self, PROPERTIES[name].field))}" for name in self.given
        )
        return f"{self.type}({', '.join(values)})"

    @property
    def type(self) -> str:
        """The name of the object."""
        return SNP_GUEST if self.kind is GuestKind.SNP else SEV_GUEST

    @property
    def given(self) -> list[str]:
        """The properties that are not at their default, in the order of `PROPERTIES`; the policy counts always."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name, one in PROPERTIES.items() if getattr(self, one.field) != defaults[one.field]]

    @property
    def vmsa_features(self) -> SevFeatures:
        """What it asks KVM for, beyond what makes an SNP guest."""
        wanted = {
            SevFeatures.DEBUG_VIRTUALIZATION: self.debug_swap,
            SevFeatures.RESTRICTED_INJECTION: self.restricted_injection,
            SevFeatures.ALTERNATE_INJECTION: self.alternate_injection,
        }
        return SevFeatures(sum(feature for feature, on in wanted.items() if on))

    def check_tree(self, era: Era) -> None:
        """`VmmError` for a property that the QEMU of this kernel does not have."""
        v7 = era.private_file is PrivateFile.RESTRICTEDMEM
        finish = era.payloads[SevOp.SNP_LAUNCH_FINISH].fields
        for name in self.given:
            lost = not v7 and PROPERTIES[name].tree is Tree.V7
            lost |= PROPERTIES[name].tree is Tree.SVSM and not era.vmsa_features & INJECTION_MODES
            if lost or (name == "vcek-disabled" and "vcek_disabled" not in finish):
                raise VmmError(f"Property '{self.type}.{name}' not found")
        if self.debug_swap and era.init_op is not SevOp.INIT2:
            raise VmmError(f"Property '{self.type}.debug-swap' not found")
        if self.legacy_vm_type and not era.vm_types & {kind.vm_type for kind in (GuestKind.SEV, GuestKind.SEV_ES)}:
            raise VmmError(f"Property '{self.type}.legacy-vm-type' not found")


def default_object(kind: GuestKind, **properties: object) -> SevObject | None:
    """The object of a kind of guest as QEMU makes it, with changed properties; None for a plain guest."""
    if kind is GuestKind.PLAIN:
        if properties:
            raise VmmError(f"{', '.join(map(_dashed, properties))}: a plain guest has no sev-guest object")
        return None
    legacy = DEFAULT_LEGACY_POLICY | (LEGACY_POLICY_ES if kind is GuestKind.SEV_ES else 0)
    policy = DEFAULT_POLICY if kind is GuestKind.SNP else legacy
    unknown = [name for name in properties if _dashed(name) not in PROPERTIES]
    if unknown:
        raise VmmError(f"{', '.join(map(_dashed, unknown))}: one of {', '.join(PROPERTIES)}")
    return SevObject(**{"kind": kind, "policy": policy, **properties})  # type: ignore[arg-type]


def read_property(one: Property, text: str) -> object:
    """A property's value from its text; `VmmError` in QEMU's words."""
    match one.text:
        case Text.WORD:
            return text
        case Text.UINT32 | Text.UINT64:
            return _number(one, text)
        case Text.BASE64:
            return decoded(text)
    words = ("none", "both") if one.text is Text.DISCARD else ("off", "on")
    if text not in words:
        wanted = " or ".join(f"'{word}'" for word in reversed(words))
        raise VmmError(f"Parameter '{one.name}' expects {wanted}")
    return text == words[1]


def print_property(one: Property, value: object) -> str:
    """The text of a value; the reverse of `read_property`."""
    match one.text:
        case Text.UINT32 | Text.UINT64:
            assert isinstance(value, int)
            return f"{value:#x}" if one.name == "policy" else str(value)
        case Text.BASE64:
            assert isinstance(value, bytes)
            return b64encode(value).decode()
        case Text.DISCARD:
            return "both" if value else "none"
        case Text.ON_OFF:
            return "on" if value else "off"
    return str(value)


def decoded(text: str | bytes) -> bytes:
    """Base64 as QEMU reads it: line breaks are nothing. `VmmError` for what is none."""
    plain = b"".join((text if isinstance(text, bytes) else text.encode()).split())
    try:
        return b64decode(plain, validate=True)
    except binascii.Error as error:
        raise VmmError(f"Base64 data '{plain.decode(errors='replace')}' is not valid") from error


def _number(one: Property, text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError as error:
        raise VmmError(f"Parameter '{one.name}' expects integer") from error
    width = 32 if one.text is Text.UINT32 else 64
    if not 0 <= value < 1 << width:
        raise VmmError(f"Parameter '{one.name}' expects uint{width}_t")
    return value


def _dashed(field: str) -> str:
    return field.replace("_", "-")
