import pytest

from snpbook.trace import Message
from snpbook.views.log import log
from snpbook.views.static import Static
from snpbook.widgets.view import MARK, Panel


def test_a_panel_shows_each_state_it_is_given() -> None:
    panel = Panel(log, [Message(source="kernel", text="first")])
    assert "first" in panel.describe()
    panel.show([Message(source="kernel", text="second")])
    assert "second" in panel.value
    assert "first" not in panel.value
    assert repr(panel) == panel.describe() == log([Message(source="kernel", text="second")]).text


def test_the_bundle_of_every_view_has_three_forms() -> None:
    data, metadata = Panel(lambda text: Static(text, f"<p>{text}</p>"), "calm")._repr_mimebundle_(include=None)
    assert data.pop("application/vnd.jupyter.widget-view+json")["version_major"] == 2
    assert data == {"text/plain": "calm", "text/html": f'<div class="{MARK}"><p>calm</p></div>'}
    assert metadata == {}


def test_static_shows_as_text_or_html() -> None:
    view = Static("words", "<p>words</p>")
    assert (repr(view), view._repr_html_()) == ("words", "<p>words</p>")
    with pytest.raises(AttributeError):
        view.text = "other"  # type: ignore[misc]
