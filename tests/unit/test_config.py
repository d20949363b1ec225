"""model.toml, environment and options: what wins, and what a person is told when something is wrong."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torrentlm.config import (
    NODE_KEYS,
    AdapterRecipe,
    NodeConfig,
    Recipe,
    Settings,
    load,
    merge,
    parse_size,
    variable_of,
)
from torrentlm.config.merging import ADAPTER_KEYS, MAX_FILE, MODEL_KEYS, SOURCE_KEYS, SPLIT_KEYS
from torrentlm.errors import ConfigError
from torrentlm.records import Endpoint, Span

MAGNET = "magnet:?xt=urn:btih:" + "ab" * 20
DOC = Path(__file__).parents[2] / "docs" / "model-toml.md"

FULL = """
[model]
name = "Tiny"
layers_per_block = 2
dtype = "BF16"
floor = "INT8"

[model.source]
package = "tiny_package"
file = "weights.gguf"

[node]
data = "swarm-data"
host = "127.0.0.1"
port = 7000
peers = ["10.0.0.1:6881", "[::1]:6882"]
dht_bootstrap = ["10.0.0.2:6881"]
blocks = "3-5"
ram = "4GB"
vram = "512 MiB"
offload = "2GB"
disk = 1000
precision = "BF16"
precision_of = { "4" = "INT4", "1-3" = "INT8" }
threads = 2
lease = 30
"""


def from_toml(text: str, tmp_path: Path, **overrides: object) -> Settings:
    path = tmp_path / "model.toml"
    path.write_text(text)
    return load(path, overrides=overrides, environment={})


def node(document: dict[str, object] | None = None, environment: dict[str, str] | None = None, **overrides: object):
    settings = merge(
        {"magnet": MAGNET, "node": document or {}}, Path("/file"), environment or {}, overrides, folder=Path("/here")
    )
    return settings.node


def sentence(text: str, tmp_path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        from_toml(text, tmp_path)
    return str(caught.value)


def test_every_key_is_read(tmp_path: Path):
    settings = from_toml(FULL, tmp_path)
    assert settings.magnet is None
    assert settings.recipe == Recipe(
        "Tiny", package="tiny_package", file="weights.gguf", layers_per_block=2, dtype="BF16", floor="INT8"
    )
    assert settings.node == NodeConfig(
        data=tmp_path / "swarm-data",
        host="127.0.0.1",
        port=7000,
        peers=(Endpoint("10.0.0.1", 6881), Endpoint("::1", 6882)),
        dht_bootstrap=(Endpoint("10.0.0.2", 6881),),
        blocks=Span(3, 5),
        ram=4_000_000_000,
        vram=512 << 20,
        offload=2_000_000_000,
        disk=1000,
        precision="BF16",
        precision_of=((Span(1, 3), "INT8"), (Span(4, 4), "INT4")),
        threads=2,
        lease=30.0,
    )


def test_a_magnet_alone_takes_the_defaults(tmp_path: Path):
    environment = {"XDG_DATA_HOME": str(tmp_path)}
    expected = Settings(magnet=MAGNET, node=NodeConfig(data=tmp_path / "torrentlm"))
    assert load(MAGNET, environment=environment) == expected
    (tmp_path / "model.toml").write_text(f'magnet = "{MAGNET}"')
    assert load(tmp_path / "model.toml", environment=environment) == expected


def test_paths_of_the_file_start_at_the_file_and_all_others_at_the_working_directory(tmp_path: Path):
    source = '[model]\nname = "M"\n[model.source]\n'
    assert from_toml(source + 'folder = "hf"', tmp_path).recipe == Recipe("M", folder=tmp_path / "hf")
    assert from_toml(source + 'gguf = "../a.gguf"', tmp_path).recipe == Recipe("M", gguf=tmp_path / "../a.gguf")
    assert node({"data": "d"}).data == Path("/file/d")
    assert node({}, {"TORRENTLM_DATA": "d"}).data == Path("/here/d")
    assert node({}, data="d").data == Path("/here/d")
    assert node({}, data=Path("/abs")).data == Path("/abs")
    assert node({"data": "~/d"}).data == Path.home() / "d"


def test_option_beats_environment_beats_file_beats_default():
    file, environment = {"port": 1}, {"TORRENTLM_PORT": "2"}
    assert node().port == NodeConfig().port
    assert node(file).port == 1
    assert node(file, environment).port == 2
    assert node(file, environment, port=3).port == 3
    assert node(file, environment, port=0).port == 0
    assert node(file, environment, port=None).port == 2
    assert node(file, {"TORRENTLM_PORT": ""}).port == 1


def test_lists_replace_each_other():
    one, two = Endpoint("a", 1), Endpoint("b", 2)
    assert node({"peers": ["a:1"]}).peers == (one,)
    assert node({"peers": ["a:1"]}, {"TORRENTLM_PEERS": "b:2, a:1"}).peers == (two, one)
    assert node({"peers": ["a:1"]}, peers=("b:2",)).peers == (two,)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("host", "::1", "::1"),
        ("dht_bootstrap", "public", None),
        ("dht_bootstrap", "none", ()),
        ("dht_bootstrap", "a:1,b:2", (Endpoint("a", 1), Endpoint("b", 2))),
        ("devices", "auto", None),
        ("devices", "cpu", ("cpu",)),
        ("devices", "cpu:0, cpu:1", ("cpu:0", "cpu:1")),
        ("devices", "cuda:1, CPU,cuda,cuda:1", ("cuda:1", "cpu", "cuda:0")),
        ("blocks", "auto", "auto"),
        ("blocks", "none", "none"),
        ("blocks", "7", Span(7, 7)),
        ("blocks", "0-10", Span(0, 10)),
        ("ram", "1.5 GiB", 3 << 29),
        ("vram", "auto", None),
        ("offload", "48GB", 48 * 10**9),
        ("offload", "off", 0),
        ("disk", "12", 12),
        ("precision", "F32", "F32"),
        ("precision", "INT4", "INT4"),
        ("precision_of", "1-3=INT8, 5=BF16", ((Span(1, 3), "INT8"), (Span(5, 5), "BF16"))),
        ("threads", "4", 4),
        ("threads", "auto", None),
        ("lease", "2.5", 2.5),
        ("allow_code", f"{'AB' * 32}, {'0' * 64}", ("ab" * 32, "0" * 64)),
    ],
)
def test_text_of_the_environment(name: str, text: str, value: object):
    assert getattr(node({}, {f"TORRENTLM_{name.upper()}": text}), name) == value


@pytest.mark.parametrize(
    ("given_words", "value"), [(("none",), ()), (("public",), None), (["a:1"], (Endpoint("a", 1),))]
)
def test_bootstrap_words_also_as_a_repeated_option(given_words: object, value: object):
    assert node(dht_bootstrap=given_words).dht_bootstrap == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[node]\nprot = 1", ['"prot" in [node]', 'did you mean "port"?']),
        ("port = 1", ['"port" at the top', 'did you mean "port" in [node]?']),
        ("[model]\nname = 'x'\ngguf = 'x'", ['"gguf" in [model]', 'did you mean "gguf" in [model.source]?']),
        ("[model.source]\nfodler = 'x'", ['"fodler" in [model.source]', 'did you mean "folder"?']),
        ("[nodes]\nport = 1", ['"nodes" at the top', 'did you mean "node"?']),
        ("[node]\nzzz = 1", ['"zzz" in [node]', "the keys there are data, host, port"]),
    ],
)
def test_unknown_keys_name_table_and_nearest(text: str, says: list[str], tmp_path: Path):
    if "[model" not in text:
        text = (f'magnet = "{MAGNET}"\n' + text) if text.startswith("[") else text + f'\nmagnet = "{MAGNET}"'
    message = sentence(text, tmp_path)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('port = "6881"', ["port in [node]", "whole number", "not the text '6881'"]),
        ("port = true", ["port in [node]", "not true"]),
        ("port = 65536", ["port in [node]", "65535"]),
        ("port = 1.0", ["port in [node]", "not the number 1.0"]),
        ("data = 3", ["data in [node]", "path", "not the number 3"]),
        ('data = ""', ["data in [node]"]),
        ('host = "a\\nb"', ["host in [node]"]),
        ('peers = "a:1"', ["peers in [node]", "list"]),
        ('peers = ["a"]', ["peers in [node]", "HOST:PORT", "'a'"]),
        ("peers = [1]", ["peers in [node]", "not the list [1]"]),
        ('dht_bootstrap = "publik"', ["dht_bootstrap in [node]", 'did you mean "public"?']),
        ('devices = "gpu"', ["devices in [node]", '"cuda:0"']),
        ('devices = "cud"', ['did you mean "cuda"?']),
        ("devices = []", ["devices in [node]", '"auto", or a list']),
        ("devices = [3]", ["devices in [node]"]),
        ('devices = ["auto", "cpu"]', ["devices in [node]"]),
        ('blocks = "5-3"', ["blocks in [node]", "5-3 is not a range"]),
        ("blocks = 3", ["blocks in [node]", "range"]),
        ('blocks = "atuo"', ["blocks in [node]", 'did you mean "auto"?']),
        ('ram = "4 apples"', ["ram in [node]", "4GB"]),
        ("ram = -1", ["ram in [node]", "not the number -1"]),
        ('precision = "BF61"', ["precision in [node]", 'did you mean "BF16"?']),
        ('precision_of = { "1-3" = "INT3" }', ["precision_of in [node]", "a table of blocks"]),
        ('precision_of = { "1-3" = "INT8", "3" = "INT4" }', ["precision_of in [node]", "overlap"]),
        ('precision_of = "INT8"', ["precision_of in [node]", "a table of blocks"]),
        (f'allow_code = ["{"a" * 63}"]', ["allow_code in [node]", "64 hexadecimal digits"]),
        ("threads = 0", ["threads in [node]", "from 1 to 1024"]),
        ("lease = 0", ["lease in [node]", "seconds"]),
        ("lease = true", ["lease in [node]", "not true"]),
        ("lease = nan", ["lease in [node]"]),
        ("port = {a = 1}", ["port in [node]", "not a table"]),
    ],
)
def test_wrong_values_name_the_key_and_what_it_wants(line: str, says: list[str], tmp_path: Path):
    message = sentence(f'magnet = "{MAGNET}"\n[node]\n{line}', tmp_path)
    assert all(part in message for part in says), message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must name one model"),
        (f'magnet = "{MAGNET}"\n[model]\nname = "x"\n', "must name one model"),
        ('magnet = "http:x"', 'begins with "magnet:?"'),
        ("magnet = 3", 'begins with "magnet:?"'),
        ('[model]\nname = "x"', "exactly one of folder, gguf, package and config (it has none of them)"),
        ('[model.source]\nfolder = "x"', "has no name"),
        ('[model]\nname="x"\n[model.source]\nfolder="x"\ngguf="y"', "(it has folder and gguf)"),
        ('[model]\nname="x"\n[model.source]\npackage="x"', "package and file together"),
        ('[model]\nname="x"\n[model.source]\nfolder="x"\nfile="y"', "package and file together"),
        ('[model]\nname="x"\nlayers_per_block = 0\n[model.source]\nfolder="x"', "layers_per_block in [model]"),
        ('[model]\nname="x"\ndtype = "BF61"\n[model.source]\nfolder="x"', 'did you mean "BF16"?'),
        ('model = "x"', "must be a table, [model]"),
        ('[model]\nname="x"\nsource="y"', "must be a table, [model.source]"),
        ("node = 1\nmagnet = 'magnet:?x'", "must be a table, [node]"),
        ("a b", "not valid TOML"),
    ],
)
def test_a_file_that_names_no_model_or_contradicts_itself(text: str, says: str, tmp_path: Path):
    assert says in sentence(text, tmp_path)


def test_files_that_are_no_model_toml(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge").write_bytes(b"#" * (MAX_FILE + 1))
    for name, says in (("absent", "no such file"), (".", "directory"), ("binary", "text file"), ("huge", "too large")):
        with pytest.raises(ConfigError, match=says):
            load(tmp_path / name, environment={})


def test_the_environment_and_options_are_checked_too():
    for environment, says in (
        ({"TORRENTLM_PORT": "many"}, "TORRENTLM_PORT must be a whole number.*'many'"),
        ({"TORRENTLM_PROT": "1"}, "TORRENTLM_PROT; did you mean TORRENTLM_PORT?"),
        ({"TORRENTLM_PEERS": "a"}, "TORRENTLM_PEERS must be a list"),
    ):
        with pytest.raises(ConfigError, match=says):
            node({}, environment)
    with pytest.raises(ConfigError, match=r"--peer must be a list.*'x'"):
        node(peers=("x",))
    with pytest.raises(ConfigError, match='"prot"'):
        node(prot=1)
    assert node({}, {"TORRENTLM_TEST_ANYTHING": "1", "TORRENTLM_DEBUG": "1"}) == node()


@given(st.integers(0, 2**40), st.sampled_from(["", "B", "KB", "kib", "MB", "MiB", "GB", "GiB", "T"]), st.booleans())
def test_sizes(number: int, unit: str, space: bool):
    factor = {"": 1, "b": 1, "kb": 1000, "kib": 1024, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30, "t": 10**12}
    number %= 1000
    assert parse_size(f"{number}{' ' * space}{unit}") == number * factor[unit.lower()]


@given(st.one_of(st.text(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_a_size_is_a_size_or_an_error(value: object):
    try:
        assert 0 <= parse_size(value) < 1 << 63
    except ValueError:
        return
    assert isinstance(value, str)


def test_adapters_belong_to_whatever_model_the_file_names(tmp_path: Path):
    adapters = '[[adapter]]\nname = "pirate"\nfolder = "lora"\n[[adapter]]\nname = "poet"\nfolder = "/poet"\n'
    settings = from_toml(f'magnet = "{MAGNET}"\n{adapters}[node]\nadapters = "2MB"', tmp_path)
    pirate, poet = (AdapterRecipe("pirate", tmp_path / "lora"), AdapterRecipe("poet", Path("/poet")))
    assert (settings.magnet, settings.adapters, settings.node.adapters) == (MAGNET, (pirate, poet), 2_000_000)
    assert from_toml(FULL + adapters, tmp_path).adapters == (pirate, poet)
    assert from_toml(FULL, tmp_path).adapters == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[adapter]]\nname = "x"', "no folder"),
        ('[[adapter]]\nfolder = "x"', "no name"),
        ('[[adapter]]\nname = "x"\nfolder = "x"\nfodler = "x"', 'did you mean "folder"'),
        ('[adapter]\nname = "x"\nfolder = "x"', "[[adapter]]"),
        ("[[adapter]]\nname = 3\nfolder = 'x'", "a short text"),
        ("[node]\nadapters = true", '"off"'),
        ("[node]\nadapters = 'of'", 'did you mean "off"'),
    ],
)
def test_what_an_adapter_table_cannot_say(text: str, says: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        from_toml(f'magnet = "{MAGNET}"\n{text}', tmp_path)
    assert says in str(error.value)


def test_document_and_dataclasses_agree():
    """docs/model-toml.md has one table per TOML table, a row per key, with the default that the code has."""
    assert tuple(NODE_KEYS) == tuple(key.name for key in fields(NodeConfig))
    assert {*MODEL_KEYS, *SOURCE_KEYS, *SPLIT_KEYS} == {key.name for key in fields(Recipe)}
    sections = re.split(r"^## ", DOC.read_text(), flags=re.MULTILINE)
    rows = {
        match[1]: dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE))
        for section in sections
        if (match := re.match(r"`\[([\w.]+)\]`", section))
    }
    assert set(rows["model"]) == set(MODEL_KEYS)
    assert set(rows["model.source"]) == set(SOURCE_KEYS)
    assert set(rows["model.split"]) == set(SPLIT_KEYS)
    assert set(rows["adapter"]) == set(ADAPTER_KEYS) == {key.name for key in fields(AdapterRecipe)}
    assert set(rows["node"]) == set(NODE_KEYS)
    for name, default in rows["node"].items():
        if name != "data":
            documented = node(tomllib.loads(f"{name} = {default.strip('`')}"))
            assert getattr(documented, name) == getattr(NodeConfig(), name), name
    for name in NODE_KEYS:
        assert variable_of(name) in DOC.read_text()


def test_the_example_in_the_document_is_valid(tmp_path: Path):
    examples = re.findall(r"```toml\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        from_toml(example, tmp_path)
