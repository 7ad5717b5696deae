"""Released networks by name; files with official names and random weights stand in for them."""
import io

import pytest
import torch

import download
import models
import report
import zoo
from loopback import serving
from tiny import fill, golden_channels

CHANNELS = {"drn_s30": "search_x4p03", "swinir_light_drc": "swinir_light_drc_channel_config",
            "dcls_drc": "DCLS_prune03"}


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Call it with a name: a network with random weights is then served under its address."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "PAUSE", 0)
    with serving() as (site, address):
        def serve(name: str):
            released = zoo.NETWORKS[name]
            file = released.url.rpartition("/")[2]
            model = fill(models.build(released.arch, released.scale, released.widths))
            blob = io.BytesIO()
            torch.save(model.state_dict(), blob)
            site.files[f"/{file}"] = blob.getvalue()
            monkeypatch.setitem(zoo.NETWORKS, name, released._replace(url=f"{address}/{file}"))
            return model, site
        yield serve


@pytest.mark.parametrize("name", CHANNELS)
def test_the_widths_are_those_of_the_authors(name):
    assert list(zoo.NETWORKS[name].widths) == golden_channels(CHANNELS[name])


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_every_name_can_be_built(name):
    released = zoo.NETWORKS[name]
    with torch.device("meta"):
        models.build(released.arch, released.scale, released.widths)
    assert released.url.startswith("https://")


def test_a_name_is_a_network(served):
    model, site = served("swinir_light_drc")
    loaded = models.load("zoo:swinir_light_drc")
    assert loaded.widths == model.widths
    for a, b in zip(model.parameters(), loaded.parameters()):
        assert torch.equal(a, b)
    models.load("zoo:swinir_light_drc", "swinir_light", 4)
    assert len(site.asked) == 1


def test_a_report_takes_a_name(served):
    """Beside a run, as "python report.py RUN zoo:swinir_light_drc" does."""
    model, _ = served("swinir_light_drc")
    [path] = report.parse_args(["zoo:swinir_light_drc"]).paths
    state = report.network_of(path)
    assert state["scale"] == 4 and state["widths"] == model.widths
    again = models.from_checkpoint(state).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_a_name_knows_what_it_is(served):
    served("swinir_light_drc")
    with pytest.raises(ValueError, match="holds arch swinir_light, --arch drn_s was given"):
        models.load("zoo:swinir_light_drc", "drn_s")
    with pytest.raises(ValueError, match="holds scale 4, --scale 2 was given"):
        models.load("zoo:swinir_light_drc", scale=2)
    with pytest.raises(ValueError, match="leave --channels out"):
        models.load("zoo:swinir_light_drc", channels="x.txt")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="zoo:edsr.*choose one of zoo:drn_s, zoo:drn_l"):
        models.load("zoo:edsr")


def test_without_a_network_the_sentence_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "PAUSE", 0)
    nowhere = zoo.Released("http://127.0.0.1:9/DRNS4x.pt", "drn_s")
    monkeypatch.setitem(zoo.NETWORKS, "drn_s", nowhere)
    with pytest.raises(ValueError, match="fetch it by hand and save it as .*drc/DRNS4x.pt"):
        models.load("zoo:drn_s")
