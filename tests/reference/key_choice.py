"""Who decides encryption, one access at a time, as the manual's tables 15-30 and 15-31 and their notes read."""


def choose(
    who: str,
    access: str,
    guest_c: bool,
    nested_c: bool,
    asid: int,
    paging: str,
    vtom: str,
    vte: bool,
    mem_encryption: bool,
    tsme: bool,
) -> tuple[int, bool]:
    """Key id, 0 for unencrypted; and whether the access is a reserved-bit #PF before it reaches memory."""
    host_key = 1023
    otherwise = host_key if tsme else 0  # TSME: the host's key for what nobody else encrypts
    if not mem_encryption:
        return otherwise, False
    if who in ("host", "guest"):
        return (host_key if nested_c else otherwise), False
    if access == "nested walk":
        return (host_key if nested_c else otherwise), False

    tables_have_c = paging in ("pae", "long")
    top_of_memory = who == "snp" and vtom != "off"
    fault = top_of_memory and tables_have_c and guest_c

    if access in ("fetch", "guest walk"):
        return asid, fault
    if not tables_have_c:
        return asid, False
    if top_of_memory:
        private = vtom == "below"
    elif who == "sev" and vte:
        private = True
    else:
        private = guest_c
    if private:
        return asid, fault
    return (host_key if nested_c else otherwise), fault
