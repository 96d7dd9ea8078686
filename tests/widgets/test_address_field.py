"""A field for an address: what is typed reaches Python at once, and what is no number is told by the field's name."""

import pytest

from snpbook.widgets.address_field import AddressField


def test_what_is_typed_does_not_wait_for_a_busy_kernel() -> None:
    """States are throttled and may come late; the message beside them does not."""
    field, seen = AddressField(description="First GPA", value="0x1000"), []
    field.observe(lambda change: seen.append(change.new), "value")
    field._handle_custom_msg("0x2000", [])
    field._handle_custom_msg("0x2000", [])
    assert (field.number, seen) == (0x2000, ["0x2000"])


def test_what_is_no_number_names_the_field() -> None:
    with pytest.raises(ValueError, match="First GPA: 'page' is no number"):
        assert AddressField(description="First GPA", value="page").number
