"""2 MB entries of the RMP: made by a conversion, kept by a large PVALIDATE, taken apart by smaller pages."""

from snpbook.regimes.shattering import shattering


def test_what_takes_2_mb_apart() -> None:
    samples = list(shattering())
    assert [sample.pages.large for sample in samples] == [0, 2, 2, 1, 0]
    assert [sample.work.psmashes for sample in samples] == [0, 0, 0, 1, 2]
    base = samples[0].pages.assigned
    assert [sample.pages.assigned - base for sample in samples] == [0, 1024, 1024, 1024, 1023]


def test_on_fragmented_memory_there_is_nothing_to_take_apart() -> None:
    samples = list(shattering(fragmented=True))
    assert {(sample.pages.large, sample.work.psmashes) for sample in samples} == {(0, 0)}
    assert [sample.pages.assigned for sample in samples] == [sample.pages.assigned for sample in shattering()]
