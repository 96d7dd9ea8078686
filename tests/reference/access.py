"""The checks of the RMP on one access to one page, as the hardware sheet's section 6 has them: a row per branch.

The access has passed the page tables, host's or guest's and nested: nothing here looks at them. Numbers are typed
again on purpose. Sources: APM2 15.36.10, table 15-39; Linux kvm_host.h (EXITINFO1).
"""

from tests.reference.rmp import ReferenceRmp

Outcome = tuple[str, int]
"""GRANTED with 0; #PF with its error code; NPF with EXITINFO1; #VC with 0x404; IOMMU with 0, there being no number."""

GRANTED: Outcome = ("GRANTED", 0)
NOT_VALIDATED: Outcome = ("#VC", 0x404)
IOMMU: Outcome = ("IOMMU", 0)

P, W, U, RSVD, FETCH, SSS_ACCESS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6
RMP, FINAL, WALK, ENC, SIZEM, VMPL, SSS = (1 << bit for bit in (31, 32, 33, 34, 35, 36, 37))

READ_RIGHT, WRITE_RIGHT, USER_FETCH_RIGHT, SUPERVISOR_FETCH_RIGHT, SSS_RIGHT = 1, 2, 4, 8, 16

ACTORS = ("host", "device", "guest", "sev", "sev-es", "snp")
"""`guest` is one without SEV; the device writes and reads through the IOMMU."""

KINDS = ("read", "write", "fetch", "walk", "ad-update", "shadow-stack read", "shadow-stack write")
"""`walk` reads a table of the actor's own paging, `ad-update` sets A or D there; shadow stacks are the supervisor's."""

WRITES = ("write", "ad-update", "shadow-stack write")
PAGE_TABLE_ACCESSES = ("walk", "ad-update")
SHADOW_STACK = ("shadow-stack read", "shadow-stack write")


def access(
    actor: str,
    kind: str,
    c_bit: bool,
    rmp: ReferenceRmp,
    page: int,
    gfn: int = 0,
    asid: int = 0,
    vmpl: int = 0,
    cpl: int = 0,
    mapping: int = 1,
    vmpl_sss: bool = True,
) -> Outcome:
    """What becomes of an access to system page `page`.

    `mapping` is the number of 4 KB pages that the host's or the nested leaf maps: 1, 512 or 512 * 512; `gfn` the guest
    page that was translated; `c_bit` is that of data: 1 in modes that have no C-bit. `vmpl_sss` is
    the guest's feature VmplSSS, without which bit 4 of a VMPL means nothing.
    """
    large = mapping > 1  # a 1 GB mapping is checked as 2 MB
    written_large = large and kind != "ad-update"  # A/D updates count as 4 KB data writes

    if actor == "host":
        if kind in ("read", "fetch", "shadow-stack read"):
            return GRANTED  # ciphertext or stale data
        if kind == "walk":
            written_large = False  # inferred: a table is reached by its address, as a 4 KB page
        if hypervisor_owned(rmp, page, written_large):
            return GRANTED
        # Inferred: a table's own refusal is told as the present page's; the write of A or D is a write.
        return "#PF", P | W * (kind in WRITES) | U * (cpl == 3) | RMP

    if actor == "device":
        # Inferred: DMA writes are checked as the hypervisor's, DMA reads pass.
        if kind == "read" or hypervisor_owned(rmp, page, large):
            return GRANTED
        return IOMMU

    refused = P | RMP | exit_info(actor, kind, c_bit)

    if actor in ("guest", "sev", "sev-es"):
        # Whatever the C-bit. A guest reads its tables through the nested mapping, whose size counts [inferred].
        if kind in ("read", "fetch", "shadow-stack read"):
            return GRANTED
        return GRANTED if hypervisor_owned(rmp, page, written_large) else ("NPF", refused)

    assert actor == "snp", actor
    if not private(actor, kind, c_bit):
        if kind in ("read", "shadow-stack read"):
            return GRANTED
        return GRANTED if hypervisor_owned(rmp, page, written_large) else ("NPF", refused)

    # RMP-Covered
    if page >= rmp.entries:
        return "NPF", refused
    entry, answer = rmp.answering(page)
    # Guest-Owned
    if not entry.assigned or entry.asid != asid:
        return "NPF", refused
    # Reverse-Map
    if answer != gfn:
        return "NPF", refused
    # Mutable
    if entry.immutable:
        return "NPF", refused
    # Page-Size: nested 2 MB and 1 GB need a 2 MB entry, nested 4 KB a 4 KB entry; an A/D update too, lest a table in
    # a 2 MB page were useless [inferred]. SIZEM is for instructions alone.
    if entry.large != large:
        return "NPF", refused
    # Validated
    if not entry.validated:
        return NOT_VALIDATED
    # VMPL
    rights = entry.vmpl[vmpl]
    if rights & needed(kind, cpl) != needed(kind, cpl):
        return "NPF", refused | VMPL
    if kind in SHADOW_STACK and vmpl_sss and not rights & SSS_RIGHT:
        return "NPF", refused | VMPL | SSS  # inferred: the permission of bit 4, a check of the VMPL as well
    return GRANTED


def hypervisor_owned(rmp: ReferenceRmp, page: int, large: bool) -> bool:
    """Uncovered, or assigned = 0; through a 2 MB mapping so for each of the 512."""
    first = page - page % 512
    pages = range(first, first + 512) if large else [page]
    return not any(number < rmp.entries and rmp.answering(number)[0].assigned for number in pages)


def private(actor: str, kind: str, c_bit: bool) -> bool:
    """The effective C-bit: a guest with SEV fetches and walks privately, always; without SEV it has no C-bit."""
    if actor not in ("sev", "sev-es", "snp"):
        return False
    return kind == "fetch" or kind in PAGE_TABLE_ACCESSES or c_bit


def needed(kind: str, cpl: int) -> int:
    """The bits of the VMPL's byte that an access needs: W without R is illegal, so data needs R always."""
    if kind == "fetch":
        return USER_FETCH_RIGHT if cpl == 3 else SUPERVISOR_FETCH_RIGHT
    return READ_RIGHT | WRITE_RIGHT * (kind in WRITES)


def exit_info(actor: str, kind: str, c_bit: bool) -> int:
    """The bits of EXITINFO1 that tell of the access; nested accesses are a user's. P, RSVD and RMP come on top."""
    bits = U
    bits |= W if kind in WRITES or kind == "walk" else 0  # a table walk is a user's write to the nested tables
    bits |= FETCH if kind == "fetch" else 0
    bits |= SSS_ACCESS if kind in SHADOW_STACK else 0
    bits |= WALK if kind in PAGE_TABLE_ACCESSES else FINAL
    bits |= ENC if private(actor, kind, c_bit) else 0
    return bits


def instruction_fault(check: str) -> Outcome:
    """The fault for a check that PVALIDATE, RMPADJUST or RMPQUERY fails, by the name that ReferenceRmp gives it.

    Only RMP and SIZEM are told; that the page is present, private and final, and not written, is inferred.
    """
    if check == "NOT_VALIDATED":
        return NOT_VALIDATED
    return "NPF", P | U | RMP | FINAL | ENC | SIZEM * (check == "PAGE_SIZE")
