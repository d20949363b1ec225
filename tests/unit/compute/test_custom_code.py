"""Code that comes with a model: none of it runs before the operator has allowed its very bytes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import dynamic_module_utils

from tests.unit.compute.custom_models import AUTO_MAP, FILES, VOCABULARY, change_config, save
from tests.unit.holder.chain import open_chain, session_on
from torrentlm.client.as_transformers import SwarmForCausalLM
from torrentlm.compute.border import unpack
from torrentlm.compute.custom_code import MAX_BYTES, MAX_FILES, collect, read_settings, require_allowed, stored
from torrentlm.compute.skeleton import read_config
from torrentlm.config import Recipe
from torrentlm.errors import ArtifactError, UnsupportedModelError
from torrentlm.holder.model import HeldModel
from torrentlm.publish.publish import publish
from torrentlm.publish.published import Published
from torrentlm.records import Span
from torrentlm.swarm.store import Store

THIRDS = [Span(0, 1), Span(2, 3), Span(4, 5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as store:
        yield store


@pytest.fixture(autouse=True)
def no_cache_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where transformers would copy code to before it runs it; nothing may come there."""
    never = tmp_path / "never"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(never))
    yield
    assert not never.exists()
    assert not any(path.startswith(str(never)) for path in sys.path)


def digest_of(folder: Path) -> str:
    code = collect(folder, read_settings(folder))
    assert code is not None
    return code.digest


def hold(published: Published, store: Store, span: Span, allow_code: tuple[str, ...]) -> HeldModel:
    paths = {file.name: store.path(file.name) for file in published.manifest.files}
    model = published.manifest
    return HeldModel(published.magnet.v2 or b"", model, published.folder, paths, span, "F32", allow_code=allow_code)


# --- what belongs to it


def test_the_files_that_auto_map_names_and_what_these_import(folder: Path) -> None:
    code = collect(folder, read_settings(folder))
    assert code is not None
    assert sorted(code.files) == sorted(FILES)
    assert dict(code.classes) == AUTO_MAP


def test_the_hash_is_that_of_what_sha256sum_says(folder: Path) -> None:
    command = f"LC_ALL=C sha256sum {' '.join(sorted(FILES))} | sha256sum"
    found = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert digest_of(folder) == found.split()[0]


def test_code_beside_a_model_that_transformers_knows_is_left_alone(folder: Path, store: Store) -> None:
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert collect(folder, read_settings(folder)) is None
    change_config(folder, architectures=["OwnForCausalLM"])  # or another function would be computed, silently
    assert collect(folder, read_settings(folder)) is not None


@pytest.mark.parametrize(
    ("changes", "files", "says"),
    [
        ({"AutoModelForCausalLM": "../evil.Model"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "sub/evil.Model"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "sub.evil.Model"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "someone/repo--modeling_own.OwnForCausalLM"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": ["modeling_own.OwnForCausalLM"]}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "absent.Model"}, {}, "absent.py"),
        ({}, {"parts.py": "from .sub.evil import x"}, "imports from another folder"),
        ({}, {"parts.py": "from ..evil import x"}, "imports from another folder"),
        ({}, {"parts.py": "from .absent import x"}, "absent.py"),
        ({}, {"parts.py": "def ("}, "parts.py beside config.json is no Python"),
        ({}, {"parts.py": "x = '\0'"}, "parts.py beside config.json is no Python"),
        ({}, {"parts.py": "#" * MAX_BYTES}, "more than 32 files or 1 MiB"),
        (
            {},
            {f"m{n}.py": f"from .m{n + 1} import x" for n in range(MAX_FILES)} | {"parts.py": "from .m0 import x"},
            "32",
        ),
    ],
)
def test_a_publisher_refuses(folder: Path, store: Store, changes: dict, files: dict[str, str], says: str) -> None:
    change_config(folder, auto_map=AUTO_MAP | changes)
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ArtifactError, match=says) as error:
        publish(Recipe("own", folder, tokenizer=False), store)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "files", "says"),
    [
        ({"AutoModelForCausalLM": "../evil.Model"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "sub/evil.Model"}, {}, "must be module.Class"),
        ({"AutoModelForCausalLM": "absent.Model"}, {}, "absent.py"),
        ({}, {"not-a-module.py": ""}, "cannot be the name"),
        ({}, {"zzz.py": "#" * MAX_BYTES}, "more than 32 files or 1 MiB"),
        ({}, {f"m{n}.py": "" for n in range(MAX_FILES)}, "more than 32 files"),
    ],
)
def test_a_reader_refuses(folder: Path, changes: dict, files: dict[str, str], says: str) -> None:
    change_config(folder, auto_map=AUTO_MAP | changes)
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ArtifactError, match=says):
        require_allowed(folder, ())


# --- refused, allowed, refused again


def test_refused_unless_allowed_by_publisher_and_holder(folder: Path, store: Store) -> None:
    digest = digest_of(folder)
    for allowed in ((), ("0" * 64,), (hashlib.sha256(b"").hexdigest(),)):
        with pytest.raises(UnsupportedModelError) as error:
            publish(Recipe("own", folder, tokenizer=False), store, allow_code=allowed)
        assert f'allow_code = ["{digest}"]' in str(error.value)
        assert "configuration_own.py, modeling_own.py, parts.py" in str(error.value)
    assert not list(store.data.glob("models/*")) and not list(store.data.glob("blocks/*"))
    published = publish(Recipe("own", folder, tokenizer=False), store, allow_code=(digest,))
    names = {path.name for path in published.folder.iterdir()}
    assert names >= set(FILES) and "unrelated.py" not in names
    assert json.loads((published.folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    for check in (
        lambda: hold(published, store, Span(0, 5), ()),
        lambda: read_config(published.folder),
        lambda: require_allowed(published.folder, ()),
    ):
        with pytest.raises(UnsupportedModelError, match=re.escape(digest)):
            check()
    require_allowed(published.folder, (digest,))


def test_it_runs_exactly_over_three_holders(tmp_path: Path, store: Store) -> None:
    whole = save(tmp_path / "checkpoint")
    digest = digest_of(tmp_path / "checkpoint")
    published = publish(Recipe("own", tmp_path / "checkpoint", tokenizer=False), store, allow_code=(digest,))
    assert published.manifest.architecture == "OwnForCausalLM"
    ids = [5, 17, 3, 80, 41]
    logits: list[Any] = []

    async def main() -> None:
        paths = {file.name: store.path(file.name) for file in published.manifest.files}
        with trio.fail_after(60):
            async with (
                open_chain(published, paths, THIRDS, allow_code=(digest,)) as chain,
                session_on(chain, published.magnet.v2 or b"") as session,
            ):
                logits.extend([unpack(await session.step([ids])), unpack(await session.step([[9]]))])

    trio.run(main)
    with torch.no_grad():
        expected = whole(torch.tensor([[*ids, 9]])).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape[-1] == VOCABULARY


def test_own_classes_for_a_config_that_transformers_knows(folder: Path, store: Store) -> None:
    """auto_map without AutoConfig: the config is transformers' own, the model is not."""
    change_config(
        folder, model_type="llama", gain=2.0, auto_map={"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]}
    )
    text = (folder / "modeling_own.py").read_text()
    (folder / "modeling_own.py").write_text(text.replace("    config_class = OwnConfig\n", ""))
    published = publish(Recipe("own", folder, tokenizer=False), store, allow_code=(digest_of(folder),))
    assert published.manifest.architecture == "OwnForCausalLM"
    assert "up.weight" in str(published.manifest.block_tensors(1))


def test_a_changed_file_is_refused_again(folder: Path, store: Store) -> None:
    digest = digest_of(folder)
    published = publish(Recipe("own", folder, tokenizer=False), store, allow_code=(digest,))
    (published.folder / "parts.py").write_text(FILES["parts.py"] + "\n# now something else\n")
    with pytest.raises(UnsupportedModelError, match="not run unless you allow it"):
        hold(published, store, Span(0, 5), (digest,))
    (published.folder / "parts.py").write_text(FILES["parts.py"])
    (published.folder / "more.py").write_text("")  # nor may a file come along
    with pytest.raises(UnsupportedModelError, match="not run unless you allow it"):
        hold(published, store, Span(0, 5), (digest,))
    (folder / "parts.py").write_text(FILES["parts.py"] + "\n# now something else\n")
    with pytest.raises(UnsupportedModelError, match="not run unless you allow it"):
        publish(Recipe("own", folder, tokenizer=False), store, allow_code=(digest,))


def test_nothing_is_parsed_or_run_before_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    (folder / "parts.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + FILES["parts.py"])
    digest = digest_of(folder)
    (folder / "unrelated.py").unlink()
    with pytest.raises(UnsupportedModelError):
        read_config(folder)
    assert not (tmp_path / "ran").exists()
    read_config(folder, (digest,))
    assert (tmp_path / "ran").exists()
    (folder / "parts.py").write_text("def (")
    with pytest.raises(UnsupportedModelError, match="not run unless you allow it"):
        read_config(folder, (digest,))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"parts.py": "import no_such_package"}, "ModuleNotFoundError: No module named 'no_such_package'"),
        ({"parts.py": "raise KeyError('x')"}, "cannot be loaded"),
        ({"parts.py": ""}, "cannot be loaded"),
        ({"configuration_own.py": "OwnConfig = 3"}, "cannot be loaded|is no class"),
        ({"configuration_own.py": "class OwnConfig: pass"}, "must name one as AutoConfig|cannot be loaded"),
    ],
)
def test_code_that_does_not_work_here_is_one_sentence(folder: Path, files: dict[str, str], says: str) -> None:
    (folder / "unrelated.py").unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    code = stored(folder, read_settings(folder))
    assert code is not None
    with pytest.raises(UnsupportedModelError, match=says) as error:
        read_config(folder, (code.digest,))
    assert "\n" not in str(error.value)


def test_two_versions_of_one_models_code_side_by_side(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other")
    for place in (folder, tmp_path / "other"):
        (place / "unrelated.py").unlink()
    other = (tmp_path / "other" / "configuration_own.py").read_text()
    (tmp_path / "other" / "configuration_own.py").write_text(other.replace("gain=1.5", "gain=2.5"))
    for place in (folder, tmp_path / "other"):
        settings = json.loads((place / "config.json").read_text())
        settings.pop("gain", None)
        (place / "config.json").write_text(json.dumps(settings))
    gains = [read_config(place, (digest_of(place),)).gain for place in (folder, tmp_path / "other", folder)]
    assert gains == [1.5, 2.5, 1.5]


def test_a_client_runs_none_of_it(folder: Path, store: Store) -> None:
    published = publish(Recipe("own", folder, tokenizer=False), store, allow_code=(digest_of(folder),))
    client = SwarmForCausalLM.load(published.folder, None, lambda *args: pytest.fail("opened"))  # type: ignore[arg-type]
    assert client.config.vocab_size == VOCABULARY and type(client.config).__module__.startswith("transformers.")
