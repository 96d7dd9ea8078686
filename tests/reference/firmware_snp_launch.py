"""The SNP launch and the guest's messages: rows of the firmware sheet's sections 1.5 and 6.1 as ordered checks.

Above each command stands what the sheet says of it; [P S G] is `prefix`. Sources: firmware sheet 1.4, 1.5, 4, 5.2, 6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.reference.firmware_rows import (
    INACTIVE,
    NO_CONTEXT,
    NOT_INIT,
    Act,
    Change,
    Holds,
    Row,
    Spec,
    address_rows,
    ask,
    both,
    gstate_row,
    guest,
    large,
    low_rows,
    page,
    pages_other_than,
    part,
    prefix,
    reserved_row,
)  # fmt: skip
from tests.reference.firmware_snp_guests import of_guest
from tests.reference.firmware_world import (
    AGENT,
    API,
    DST,
    MIB,
    MIGRATE_MA,
    ONE,
    OUT,
    PAGE,
    POLICY,
    POLICY_BITS,
    SINGLE_SOCKET,
    SMT,
    SRC,
    Guest,
    Page,
    Request,
    World,
)  # fmt: skip

# LAUNCH_START, 30: 0:gctx 8:policy 10:ma_gctx 18:bit0 MA_EN bit1 IMI_EN 1c:desired_tsc_khz 20:gosvw[16]. [P S G];
# GSTATE not INIT->02; MA_EN and MA gctx not Context->10; policy rules->07 (sec 4): bit17=0; SMT=0 while SMT is on;
# required ABI newer than FW; reserved bits; MA_EN without MIGRATE_MA; the MA itself has an MA; MA_EN and
# SINGLE_SOCKET but MA lacks SINGLE_SOCKET. MA's GSTATE is not checked (an MA still in INIT -> 07). count+1; LAUNCH.
# Unconfirmed: the MA's address is looked at with MA_EN only.
LAUNCH_START_RESERVED = ((0x18 * 8 + 2, 0x1C * 8 - 1),)
WITH_AGENT = POLICY | MIGRATE_MA


def _launch_start() -> tuple[World, Request]:
    w, r = of_guest("INIT", 0, policy=POLICY, ma_gctx_paddr=0, ma_en=0, imi_en=0, desired_tsc_khz=0, gosvw=bytes(16))
    w.guests[AGENT] = Guest("RUNNING", 9, POLICY)
    w.pages[AGENT] = Page("CONTEXT", vmsa=True)
    w.guest_count = 1
    w.set_asid(9, "IN_USE")
    return w, r


def _agent(*changes: Change, policy: int = WITH_AGENT, **fields: object) -> Change:
    return both(ask(ma_en=1, ma_gctx_paddr=AGENT, policy=policy, **fields), *changes)


def _agents(**values: object) -> Change:
    """Another state of the migration agent."""

    def act(w: World, r: Request) -> None:
        w.guests[AGENT] = replace(w.guests[AGENT], **values)  # type: ignore[arg-type]

    return Change(f"agent {values}", act)


def _agent_has_agent(w: World, r: Request) -> bool:
    agent = w.guest(r.ma_gctx_paddr)
    return bool(r.ma_en) and (agent.ma is not None or agent.gstate == "INIT")


def _minimum_abi(policy: int) -> tuple[int, int]:
    return policy >> 8 & 0xFF, policy & 0xFF


def _started(w: World, r: Request) -> None:
    one = w.guest(r.gctx_paddr)
    one.gstate, one.policy, one.imi_en = "LAUNCH", r.policy, bool(r.imi_en)
    one.ma = r.ma_gctx_paddr if r.ma_en else None
    w.guest_count += 1


def _forbidden(name: str, holds: Holds, *changes: Change) -> Row:
    return Row(f"policy: {name}", 0x07, holds, list(changes))


LAUNCH_START = Spec(
    0xA0, _launch_start,
    [
        reserved_row(LAUNCH_START_RESERVED),
        *low_rows("gctx_paddr"),
        Row("ma_gctx_paddr not page-aligned", 0x16, lambda w, r: r.ma_en and r.ma_gctx_paddr % PAGE != 0,
            [_agent(ask(ma_gctx_paddr=AGENT + 8))]),
        NOT_INIT,
        *[replace(row, changes=[_agent(change) for change in row.changes])
          for row in address_rows("ma_gctx_paddr", when=lambda w, r: bool(r.ma_en))],
        *address_rows("gctx_paddr"), NO_CONTEXT,
        gstate_row("INIT"),
        Row("MA gctx no Context", 0x10, lambda w, r: r.ma_en and w.at(r.ma_gctx_paddr).state != "CONTEXT",
            [_agent(page(AGENT, state="FIRMWARE")), _agent(page(AGENT, state="HYPERVISOR")),
             _agent(ask(ma_gctx_paddr=OUT))]),
        _forbidden("bit 17 zero", lambda w, r: not r.policy & ONE, ask(policy=POLICY & ~ONE)),
        _forbidden("SMT", lambda w, r: w.smt and not r.policy & SMT, ask(policy=POLICY & ~SMT)),
        _forbidden("ABI", lambda w, r: _minimum_abi(r.policy) > API,
                   ask(policy=POLICY | 1 << 8 | 56), ask(policy=POLICY | 2 << 8), ask(policy=POLICY | 0xFFFF)),
        _forbidden("reserved bits", lambda w, r: r.policy & ~POLICY_BITS != 0,
                   ask(policy=POLICY | 1 << 21), ask(policy=POLICY | 1 << 26), ask(policy=POLICY | 1 << 63)),
        _forbidden("MA_EN without MIGRATE_MA", lambda w, r: r.ma_en and not r.policy & MIGRATE_MA,
                   _agent(policy=POLICY)),
        _forbidden("the MA has an MA", _agent_has_agent,
                   _agent(_agents(ma=SRC)), _agent(_agents(gstate="INIT", policy=0))),
        _forbidden("the MA lacks SINGLE_SOCKET",
                   lambda w, r: r.ma_en and r.policy & SINGLE_SOCKET & ~w.guest(r.ma_gctx_paddr).policy,
                   _agent(policy=WITH_AGENT | SINGLE_SOCKET)),
    ],
    _started, 0x30, LAUNCH_START_RESERVED,
    buffer={
        "gctx_paddr": (0, 64), "policy": (8 * 8, 64), "ma_gctx_paddr": (0x10 * 8, 64), "ma_en": (0x18 * 8, 1),
        "imi_en": (0x18 * 8 + 1, 1), "desired_tsc_khz": (0x1C * 8, 32), "gosvw": (0x20 * 8, 128),
    },
)  # fmt: skip

# LAUNCH_UPDATE, 20: 0:gctx 8:bit0 PAGE_SIZE bits3:1 PAGE_TYPE bit4 IMI_PAGE c:rsvd 10:page_paddr 18:bits7:0 rsvd,15:8
# VMPL1,23:16 VMPL2,31:24 VMPL3 1c:rsvd. [P S G]; page not Pre-Guest->1A; RMP.size != PAGE_SIZE->19; 2M unaligned->09;
# type VMSA/SECRETS/CPUID with 2M->19; type 0 or 7->16; GSTATE not LAUNCH->02; inactive->08; RMP.ASID != guest->1C;
# gctx.IMI_EN=1 and IMI_PAGE=0->16; CPUID bad->16. Page still Pre-Guest and LD unchanged after all of these. 8.1: for
# violations FW first writes the corrected values back in plaintext; not so for COUNT/04/08 errors. -> Guest-Valid,
# VMPL1-3, VMSA.
UPDATE_RESERVED = ((8 * 8 + 5, 0x10 * 8 - 1), (0x18 * 8, 0x18 * 8 + 7), (0x1C * 8, 0x20 * 8 - 1))
VMSA, SECRETS, CPUID = 2, 5, 6


def _launch_update() -> tuple[World, Request]:
    w, r = of_guest(
        "LAUNCH", 1, page_size=0, page_type=1, imi_page=0, page_paddr=SRC, vmpl1_perms=0, vmpl2_perms=0, vmpl3_perms=0
    )
    w.pages[SRC] = Page("PRE_GUEST", asid=1, gfn=0x200)
    r.memory["cpuid"] = "good"
    return w, r


def _of_2m(*changes: Change) -> Change:
    """A valid 2 MB page, spoilt further."""
    return both(large("page_paddr"), ask(page_size=1), *changes)


def _cpuid(page_is: str) -> Change:
    return ask(page_type=CPUID, cpuid=page_is)


def _updated(w: World, r: Request) -> None:
    entry = w.at(r.page_paddr)
    entry.state, entry.vmsa = "GUEST_VALID", r.page_type == VMSA
    entry.vmpl = (r.vmpl1_perms, r.vmpl2_perms, r.vmpl3_perms)


LAUNCH_UPDATE = Spec(
    0xA1, _launch_update,
    [
        *prefix(UPDATE_RESERVED, ("page_paddr",), ("page_paddr",)),
        Row("page not Pre-Guest", 0x1A, lambda w, r: w.at(r.page_paddr).state != "PRE_GUEST",
            pages_other_than("page_paddr", "PRE_GUEST")),
        Row("RMP size", 0x19, lambda w, r: w.at(r.page_paddr).large != r.page_size,
            [ask(page_size=1), large("page_paddr"),
             both(ask(page_size=1, page_paddr=SRC + PAGE), page("page_paddr", state="PRE_GUEST"))]),
        Row("2M unaligned", 0x09, lambda w, r: r.page_size and r.page_paddr % (2 * MIB) != 0,
            [_of_2m(ask(page_paddr=SRC + PAGE)), _of_2m(ask(page_paddr=SRC + 511 * PAGE))]),
        Row("type of 4K only", 0x19, lambda w, r: r.page_size and r.page_type in (VMSA, SECRETS, CPUID),
            [_of_2m(ask(page_type=kind)) for kind in (VMSA, SECRETS, CPUID)]),
        Row("type 0 or 7", 0x16, lambda w, r: r.page_type in (0, 7), [ask(page_type=0), ask(page_type=7)]),
        gstate_row("LAUNCH"),
        INACTIVE,
        Row("page of another ASID", 0x1C, lambda w, r: w.at(r.page_paddr).asid != w.guest(r.gctx_paddr).asid,
            [page("page_paddr", asid=2)]),
        Row("no IMI page", 0x16, lambda w, r: w.guest(r.gctx_paddr).imi_en and not r.imi_page, [guest(imi_en=True)]),
        Row("CPUID: count or reserved", 0x16, lambda w, r: r.page_type == CPUID and r.cpuid in ("count", "reserved"),
            [_cpuid("count"), _cpuid("reserved")]),
        Row("CPUID: violation", 0x16, lambda w, r: r.page_type == CPUID and r.cpuid == "violation",
            [_cpuid("violation")], leaves="the corrected page"),
    ],
    _updated, 0x20, UPDATE_RESERVED,
    buffer={
        "gctx_paddr": (0, 64), "page_size": (8 * 8, 1), "page_type": (8 * 8 + 1, 3), "imi_page": (8 * 8 + 4, 1),
        "page_paddr": (0x10 * 8, 64), "vmpl1_perms": (0x19 * 8, 8), "vmpl2_perms": (0x1A * 8, 8),
        "vmpl3_perms": (0x1B * 8, 8),
    },
)  # fmt: skip

# LAUNCH_FINISH, 40: 0:gctx 8:id_block 10:id_auth 18:bit0 ID_BLOCK_EN bit1 AUTH_KEY_EN bit2 VCEK_DIS (63:3 MBZ)
# 20:host_data. [P S G]; GSTATE not LAUNCH or IMI_EN=1->02; inactive->08; if ID_BLOCK_EN: LD differs->0B; policy
# differs->07; algo != 1->16; curve != 2 / not on curve / bad signature->0A (ID key, then author key). A failed author
# check leaves the ID block and digest stored. AUTH_KEY_EN without ID_BLOCK_EN is accepted unchecked. allocated -> in
# use. Read as: all of the ID key, then all of the author key (unconfirmed), the addresses as data before both.
FINISH_RESERVED = ((0x18 * 8 + 3, 0x20 * 8 - 1),)
ID_BLOCK_AT, ID_AUTH_AT = OUT, OUT + PAGE


@dataclass(frozen=True)
class Signed:
    """A key and its signature in the ID authentication page."""

    algo: int = 1
    curve: int = 2
    on_curve: bool = True
    right: bool = True


def _launch_finish() -> tuple[World, Request]:
    w, r = of_guest(
        "LAUNCH", 1, id_block_paddr=ID_BLOCK_AT, id_auth_paddr=ID_AUTH_AT, id_block_en=1, auth_key_en=1, vcek_dis=0,
        host_data=bytes(range(32)),
    )  # fmt: skip
    r.memory |= {"same_ld": True, "same_policy": True, "id_key": Signed(), "author_key": Signed()}
    return w, r


def _finished(w: World, r: Request) -> None:
    one = w.guest(r.gctx_paddr)
    one.gstate, one.vcek_dis, one.id_block = "RUNNING", bool(r.vcek_dis), bool(r.id_block_en)
    w.set_asid(one.asid, "IN_USE")


def _block_stored(w: World, r: Request) -> None:
    w.guest(r.gctx_paddr).id_block = True


def _key_rows(name: str, when: Holds, left: Act | None = None) -> list[Row]:
    def key(w: World, r: Request) -> Signed:
        found = getattr(r, name)
        assert isinstance(found, Signed)
        return found

    def row(field: str, status: int, holds: Holds, *values: object) -> Row:
        changes = [part(name, **{field: value}) for value in values]
        return Row(f"{name}: {field}", status, lambda w, r: when(w, r) and holds(w, r), changes, left=left)

    return [
        row("curve", 0x0A, lambda w, r: key(w, r).curve != 2, 1, 3),
        row("on_curve", 0x0A, lambda w, r: not key(w, r).on_curve, False),
        row("right", 0x0A, lambda w, r: not key(w, r).right, False),
    ]


def _algorithm(name: str, when: Holds) -> Row:
    changes = [part(name, algo=0), part(name, algo=2)]
    return Row(f"{name}: algo", 0x16, lambda w, r: when(w, r) and getattr(r, name).algo != 1, changes)


def _with_author(w: World, r: Request) -> bool:
    return bool(r.id_block_en and r.auth_key_en)


def _with_block(w: World, r: Request) -> bool:
    return bool(r.id_block_en)


LAUNCH_FINISH = Spec(
    0xA2, _launch_finish,
    [
        *prefix(FINISH_RESERVED),
        Row("guest not LAUNCH or IMI_EN", 0x02,
            lambda w, r: w.guest(r.gctx_paddr).gstate != "LAUNCH" or w.guest(r.gctx_paddr).imi_en,
            [guest(gstate="INIT"), guest(gstate="RUNNING"), guest(imi_en=True)]),
        INACTIVE,
        *address_rows("id_block_paddr", 0x60, lookup=False, when=_with_block),
        *address_rows("id_auth_paddr", 0x1000, lookup=False, when=_with_block),
        Row("LD differs", 0x0B, lambda w, r: r.id_block_en and not r.same_ld, [ask(same_ld=False)]),
        Row("policy differs", 0x07, lambda w, r: r.id_block_en and not r.same_policy, [ask(same_policy=False)]),
        _algorithm("id_key", _with_block),
        _algorithm("author_key", _with_author),
        *_key_rows("id_key", _with_block),
        *_key_rows("author_key", _with_author, _block_stored),
    ],
    _finished, 0x40, FINISH_RESERVED,
    buffer={
        "gctx_paddr": (0, 64), "id_block_paddr": (8 * 8, 64), "id_auth_paddr": (0x10 * 8, 64),
        "id_block_en": (0x18 * 8, 1), "auth_key_en": (0x18 * 8 + 1, 1), "vcek_dis": (0x18 * 8 + 2, 1),
        "host_data": (0x20 * 8, 256),
    },
)  # fmt: skip

# GUEST_REQUEST, 18: 0:gctx 8:request 10:response. 6.1: [P S]; gctx not Context->10; response page not Firmware->1A;
# request or response RMP size 2M->19; GSTATE != RUNNING->02; header crosses page, bad version/size/algo/MSG_SIZE->16;
# payload crosses page->16; VMPCK>3->16; tag->0B; count = 2^64-2 or SEQNO != count+1 ->1D; MSG_VERSION 0 or too new
# ->16; unknown type ->16; response does not fit page ->16. Then count += 2. only gctx_paddr must be page-aligned.
REPORT_REQ, REPORT_SIZE = 5, 0x60
MESSAGE_TYPES = (1, 3, 5, 7, 9, 0xB, 0xD, 0xF, 0x11)
RESPONSE_SIZE = 0x60 + 0x4C0
LAST = 2**64 - 2


@dataclass(frozen=True)
class Message:
    """The header of a request, 6.1, and whether its tag is right; `ahead` is SEQNO less the count."""

    algo: int = 1
    hdr_version: int = 1
    hdr_size: int = 0x60
    kind: int = REPORT_REQ
    version: int = 1
    size: int = REPORT_SIZE
    vmpck: int = 0
    ahead: int = 1
    tag: bool = True


def _guest_request() -> tuple[World, Request]:
    w, r = of_guest("RUNNING", 1, request_paddr=SRC, response_paddr=DST)
    w.pages[DST] = Page("FIRMWARE")
    r.memory["message"] = Message()
    return w, r


def _bad(field: str, status: int, holds: Callable[[Message], bool], *values: object) -> Row:
    changes = [part("message", **{field: value}) for value in values]
    return Row(f"message: {field}", status, lambda w, r: holds(r.message), changes)


def _count(w: World, r: Request) -> int:
    return w.guest(r.gctx_paddr).msg_count[r.message.vmpck % 4]


def _answered(w: World, r: Request) -> None:
    w.guest(r.gctx_paddr).msg_count[r.message.vmpck] += 2


GUEST_REQUEST = Spec(
    0x94, _guest_request,
    [
        *prefix(others=("request_paddr", "response_paddr")),
        Row("response page not Firmware", 0x1A, lambda w, r: w.at(r.response_paddr).state != "FIRMWARE",
            pages_other_than("response_paddr", "FIRMWARE")),
        Row("request page of 2 MB", 0x19, lambda w, r: w.at(r.request_paddr).large,
            [both(page("request_paddr", state="RECLAIM"), large("request_paddr"))]),
        Row("response page of 2 MB", 0x19, lambda w, r: w.at(r.response_paddr).large, [large("response_paddr")]),
        gstate_row("RUNNING"),
        Row("header crosses its page", 0x16, lambda w, r: r.request_paddr % PAGE + 0x60 > PAGE,
            [ask(request_paddr=SRC + PAGE - 0x5F), ask(request_paddr=SRC + PAGE - 1)]),
        _bad("hdr_version", 0x16, lambda m: m.hdr_version != 1, 0, 2),
        _bad("hdr_size", 0x16, lambda m: m.hdr_size != 0x60, 0, 0x5F, 0x61),
        _bad("algo", 0x16, lambda m: m.algo != 1, 0, 2),
        _bad("size", 0x16, lambda m: m.size == 0 or m.size % 16 != 0, 0, 1, 0x58),
        Row("payload crosses its page", 0x16, lambda w, r: r.request_paddr % PAGE + 0x60 + r.message.size > PAGE,
            [ask(request_paddr=SRC + PAGE - 0xB0), part("message", size=0xFB0)]),
        _bad("vmpck", 0x16, lambda m: m.vmpck > 3, 4, 255),
        _bad("tag", 0x0B, lambda m: not m.tag, False),
        Row("count used up", 0x1D, lambda w, r: _count(w, r) == LAST, [guest(msg_count=[LAST, 0, 0, 0])]),
        _bad("ahead", 0x1D, lambda m: m.ahead != 1, 0, 2),
        _bad("version", 0x16, lambda m: m.version != 1, 0, 255),
        _bad("kind", 0x16, lambda m: m.kind not in MESSAGE_TYPES, 0, 6, 0x13, 255),
        Row("response does not fit", 0x16, lambda w, r: r.response_paddr % PAGE + RESPONSE_SIZE > PAGE,
            [ask(response_paddr=DST + PAGE - RESPONSE_SIZE + 1)]),
    ],
    _answered, 0x18,
    buffer={"gctx_paddr": (0, 64), "request_paddr": (8 * 8, 64), "response_paddr": (0x10 * 8, 64)},
)  # fmt: skip

SPECS = {
    "SNP_LAUNCH_START": LAUNCH_START, "SNP_LAUNCH_UPDATE": LAUNCH_UPDATE, "SNP_LAUNCH_FINISH": LAUNCH_FINISH,
    "SNP_GUEST_REQUEST": GUEST_REQUEST,
}  # fmt: skip
