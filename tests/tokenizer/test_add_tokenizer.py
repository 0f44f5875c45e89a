"""`dist-convert tokenizer SRC DST`: the same files as a conversion with the tokenizer, in a model that has none."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from dist_convert.__main__ import main
from dist_convert.errors import UnsupportedModel
from dist_convert.formats.huggingface.add_tokenizer import add_tokenizer
from dist_convert.options import TokenizerJob
from dist_convert.write.files import held
from tests.checkpoints import Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.file_systems import mounted
from tests.tokenizer.pieces import train
from tests.tokenizer.test_finding import tiktoken_lines
from tests.tokenizer.test_huggingface_directory import files_of, make_tokenizer

LAYER = Model(layers=1)
WAITING = ".dist_convert-0123456789abcdef.partial"
TINY_LLAMA3 = Model(layers=1, vocab=128256, padded_vocab=128256, hidden=4, ffn=4)
TINY_MIXTRAL = Model(layers=1, vocab=400, padded_vocab=512, experts=2)


def converted(directory: Path, model: Model = LAYER, *flags: str, **args: Any) -> Path:
    make(directory / "in", model, **args)
    assert convert(directory / "in", directory / "out", *flags) == 0
    return directory / "out"


@pytest.mark.parametrize(
    ("kind", "model", "args", "flags"),
    [
        ("directory", LAYER, {}, ()),
        ("directory", LAYER, {}, ("--instruct",)),
        ("lines", TINY_LLAMA3, {"use_rope_scaling": True}, ("--instruct",)),
        ("lines", TINY_LLAMA3, {}, ("--source-model-type", "llama3")),
        ("pieces", TINY_MIXTRAL, {}, ("--instruct",)),
    ],
)
def test_it_makes_what_a_conversion_with_the_tokenizer_makes(
    kind: str, model: Model, args: dict[str, Any], flags: tuple[str, ...], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if kind == "directory":
        make_tokenizer(source, pad_token="w3")
    elif kind == "lines":
        tiktoken_lines(source)
    else:
        train(source)
    target = converted(tmp_path, model, **args)
    assert convert(tmp_path / "in", tmp_path / "at once", "--tokenizer", str(source), *flags) == 0
    assert main(["tokenizer", str(source), str(target), *flags]) == 0
    manifests = [json.loads((path / "conversion.json").read_text()) for path in (target, tmp_path / "at once")]
    for manifest in manifests:
        del manifest["files"]["README.md"]  # which says what tokenizer the conversion had
    assert manifests[0]["files"] == manifests[1]["files"]
    for path in (target, tmp_path / "at once"):
        (path / "conversion.json").unlink()  # which has the flags too
        (path / "README.md").unlink()
    assert files_of(target) == files_of(tmp_path / "at once")


def test_the_conversion_started_again_keeps_the_tokenizer_and_asks_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    assert "; add one (a directory or a tokenizer.model) with: dist-convert tokenizer PATH " in capsys.readouterr().err
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target), "--instruct"]) == 0
    before = files_of(target)
    assert convert(tmp_path / "in", target) == 0
    assert capsys.readouterr().err.endswith(
        f"{target} is complete already: an earlier run of this conversion has finished\n"
    )
    assert files_of(target) == before


def test_of_several_ranks_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tokenizer(tmp_path / "source")
    target = converted(tmp_path)
    before = files_of(target)
    monkeypatch.setenv("RANK", "1")
    assert main(["tokenizer", str(source), str(target)]) == 0
    assert files_of(target) == before
    monkeypatch.setenv("RANK", "0")
    assert main(["tokenizer", str(source), str(target)]) == 0
    assert "tokenizer.json" in files_of(target)


def test_settings_of_an_instruct_model_that_are_there_stay(tmp_path: Path) -> None:
    source = tiktoken_lines(tmp_path / "source")
    target = converted(tmp_path, TINY_LLAMA3, "--instruct", "--tokenizer", str(source))
    before = json.loads((target / "generation_config.json").read_text())
    assert main(["tokenizer", str(source), str(target), "--overwrite"]) == 0
    assert json.loads((target / "generation_config.json").read_text()) == before
    assert before["eos_token_id"] == [128001, 128008, 128009]


def test_a_tokenizer_that_is_there_is_replaced_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = make_tokenizer(tmp_path / "old"), make_tokenizer(tmp_path / "new", extra="new")
    (old / "chat_template.jinja").write_text("of the old one")
    target = converted(tmp_path, LAYER, "--tokenizer", str(old))
    before = files_of(target)
    assert main(["tokenizer", str(new), str(target)]) == 1
    assert "the model has a tokenizer\n" in capsys.readouterr().err
    assert files_of(target) == before
    assert main(["tokenizer", str(new), str(target), "--overwrite"]) == 0
    assert files_of(new).items() <= files_of(target).items()
    assert not (target / "chat_template.jinja").exists()
    assert files_of(target)["model.safetensors"] == before["model.safetensors"]


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("tokenizer", "nowhere", "DST is not a converted model"),
        ("tokenizer", "in", "DST is not a converted model"),
        ("nowhere", "out", "SRC names no tokenizer"),
        ("in", "out", "SRC names no tokenizer"),
    ],
)
def test_wrong_paths_are_wrong_usage_and_change_nothing(
    source: str, target: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    converted(tmp_path)
    before = files_of(tmp_path)
    assert main(["tokenizer", str(tmp_path / source), str(tmp_path / target)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert files_of(tmp_path) == before


def test_a_tokenizer_with_more_tokens_than_rows_is_a_warning_with_every_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path, Model(layers=1, vocab=20, padded_vocab=32))
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "tokenizer")), str(target)]) == 0
    warning = "sizes disagree: tokenizer 29, args 20, embedding 20 rows; 20 are written. The tokenizer's ids from 20 on"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_padding_that_nobody_knew_of_is_named_and_cut_as_by_a_conversion_with_the_tokenizer(
    size: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = make_tokenizer(tmp_path / "source"), Model(layers=1, tied=tied)
    target = converted(tmp_path, model, "--max-shard-size", size, vocab_size=None)
    at_once = ("--max-shard-size", size, "--tokenizer", str(source))
    assert convert(tmp_path / "in", tmp_path / "at once", *at_once) == 0
    assert main(["tokenizer", str(source), str(target)]) == 0
    assert "32 rows for 29 tokens of the tokenizer; --true-vocab-size 29 cuts the padding" in capsys.readouterr().err
    assert main(["tokenizer", str(source), str(target), "--true-vocab-size", "29", "--overwrite"]) == 0
    assert_same(read_tensors(target), read_tensors(tmp_path / "at once"))
    found, expected = files_of(target), files_of(tmp_path / "at once")
    whole = ("config.json", "generation_config.json", *(["model.safetensors"] if size == "5GB" else []))
    assert {name: found[name] for name in whole} == {name: expected[name] for name in whole}
    assert AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight.shape == (29, 16)
    manifest = json.loads(found["conversion.json"])["files"]
    assert {name: one["size_bytes"] for name, one in manifest.items()} == {
        name: len(content) for name, content in found.items() if name != "conversion.json"
    }


def killed(words: list[str], call: str, moment: int) -> bool:
    """Whether a command is killed before the so many-th call of a function of `os`; else it ends well."""
    child, left, original = os.fork(), [moment], getattr(os, call)
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    def counted(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)

    setattr(os, call, counted)
    os._exit(main(words))


@pytest.mark.parametrize(("call", "moments"), [("rename", (1, 2, 5, 8)), ("unlink", (1,))])
def test_a_vocabulary_is_cut_by_the_same_command_after_a_kill_before_any_change(
    call: str, moments: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tokenizer(tmp_path / "source")
    target = converted(tmp_path, Model(layers=1), "--max-shard-size", "3KB", vocab_size=None)
    shutil.copytree(target, tmp_path / "before")
    command = ["tokenizer", str(source), str(target), "--true-vocab-size", "29"]
    assert main(command) == 0
    expected = files_of(target)
    for moment in moments:
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "before", target)
        assert killed(command, call, moment)
        capsys.readouterr()
        assert main(["inspect", str(target)]) == (1 if moment > 1 else 0)
        assert ("new files of the model have not yet replaced the old ones" in capsys.readouterr().err) == (moment > 1)
        assert main(command) == 0
        assert files_of(target) == expected


def test_while_another_run_gives_a_model_its_tokenizer_all_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    (target / WAITING).write_text("half of it")
    (target / ".dist_convert-waiting.json").write_text(json.dumps({"config.json": WAITING}))
    before = files_of(target)
    command = ["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target), "--overwrite"]
    with held(target) as other:
        fcntl.flock(other.descriptor, fcntl.LOCK_EX)
        assert main(command) == 1
    assert f"\nanother process is changing files of the model\n  file:     {target}\n" in capsys.readouterr().err
    assert files_of(target) == before


def test_what_a_run_was_writing_when_it_was_killed_is_removed(tmp_path: Path) -> None:
    target = converted(tmp_path)
    (target / WAITING).write_text("half of it")
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target)]) == 0
    assert not (target / WAITING).exists()


def test_listed_files_that_are_gone_are_not_looked_for(tmp_path: Path) -> None:
    target = converted(tmp_path)
    (target / ".dist_convert-waiting.json").write_text(json.dumps({"gone.json": ""}))
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target)]) == 0
    assert not (target / ".dist_convert-waiting.json").exists()


def test_a_tokenizer_goes_on_after_a_kill_and_that_of_another_with_more_files_before_it(tmp_path: Path) -> None:
    more, few = make_tokenizer(tmp_path / "more"), make_tokenizer(tmp_path / "few")
    (more / "chat_template.jinja").write_text("{{ messages }}")
    target = converted(tmp_path)
    shutil.copytree(target, tmp_path / "before")
    commands = [["tokenizer", str(source), str(target), "--overwrite"] for source in (more, few)]
    seen, moment = set[str](), 2
    while True:
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "before", target)
        assert killed(commands[0], "rename", 2)
        if not killed(commands[1], "rename", moment):
            break
        waiting = target / ".dist_convert-waiting.json"
        seen |= (
            {name for name, made in json.loads(waiting.read_text()).items() if not made} if waiting.exists() else set()
        )
        assert main(commands[1]) == 0
        assert main(["inspect", str(target)]) == 0
        moment += 1
    assert "chat_template.jinja" in seen


@pytest.mark.parametrize(
    "listed",
    [
        [], {"config.json": "../x"}, {"config.json": "README.md"}, {"../x": WAITING}, {"/x": ""}, {".": WAITING},
        {"": ""}, {"x\0": WAITING}, {"\ud800": WAITING},
    ],
)  # fmt: skip
def test_a_list_of_waiting_files_that_nobody_wrote_is_named(
    listed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    (target / ".dist_convert-waiting.json").write_text(json.dumps(listed))
    (target / WAITING).write_text("")
    before = files_of(tmp_path)
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target)]) == 1
    assert f"  file:     {target / '.dist_convert-waiting.json'}\n" in capsys.readouterr().err
    assert before.items() <= files_of(tmp_path).items()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("40", "--true-vocab-size is not the model's\n  expected: vocab_size 29\n  found:    40\n"),
        ("28", "--true-vocab-size would cut rows of tokens\n"),
    ],
)
def test_neither_more_rows_than_there_are_nor_fewer_than_tokens_can_be_kept(
    size: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    before = files_of(target)
    source = str(make_tokenizer(tmp_path / "source"))
    assert main(["tokenizer", source, str(target), "--true-vocab-size", size]) == 2
    assert words in capsys.readouterr().err
    assert files_of(target) == before


@pytest.mark.parametrize("size", ["abc", [1], float("inf"), -1])
def test_a_config_whose_vocabulary_is_no_size_is_one_error(size: Any, tmp_path: Path) -> None:
    target = converted(tmp_path)
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": size}
    (target / "config.json").write_text(json.dumps(config))
    source = make_tokenizer(tmp_path / "source")
    with pytest.raises(UnsupportedModel, match="vocab_size is not a size"):
        add_tokenizer(TokenizerJob(source, target))


def test_a_failure_leaves_a_whole_tokenizer_and_nothing_half_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = make_tokenizer(tmp_path / "old"), make_tokenizer(tmp_path / "new", extra="new")
    target = converted(tmp_path, LAYER, "--tokenizer", str(old))
    (target / "generation_config.json").unlink()
    (target / "generation_config.json").mkdir()  # takes no file in its place
    (target / "generation_config.json" / "other").write_text("")
    assert main(["tokenizer", str(new), str(target), "--overwrite"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not (target / ".tokenizer.partial").exists()
    assert files_of(new).items() <= files_of(target).items()


def test_the_old_tokenizer_goes_only_when_the_new_one_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = make_tokenizer(tmp_path / "old"), make_tokenizer(tmp_path / "new", extra="new")
    (old / "additional_chat_templates").mkdir()
    (old / "additional_chat_templates" / "rag.jinja").write_text("of the old one")
    target = converted(tmp_path, LAYER, "--tokenizer", str(old))
    templates = target / "additional_chat_templates"
    templates.chmod(0o500)
    code = main(["tokenizer", str(new), str(target), "--overwrite"])
    if templates.exists():
        templates.chmod(0o700)
    assert files_of(new).items() <= files_of(target).items()
    if os.geteuid() != 0:  # whom no permission stops
        assert code == 1
        assert "the new tokenizer is written, but a file of the old one cannot be removed" in capsys.readouterr().err
    else:
        assert not templates.exists()


@pytest.mark.parametrize("model_type", ["llama2", "mistral"])
def test_models_with_another_tokenizer_than_llama_3s_do_not_get_its_sampling(model_type: str, tmp_path: Path) -> None:
    train(tmp_path / "source")
    target = converted(tmp_path, Model(layers=1, vocab=400, padded_vocab=512))
    assert (
        main(["tokenizer", str(tmp_path / "source"), str(target), "--instruct", "--source-model-type", model_type]) == 0
    )
    generation = json.loads((target / "generation_config.json").read_text())
    assert "temperature" not in generation


def test_what_a_generation_config_links_to_outside_is_not_written_into_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    (tmp_path / "keys.json").write_text('{"secret": "only mine"}')
    (target / "generation_config.json").unlink()
    (target / "generation_config.json").symlink_to("../keys.json")
    assert main(["tokenizer", str(make_tokenizer(tmp_path / "source")), str(target)]) == 1
    assert "a link to a file outside the directory" in capsys.readouterr().err
    assert (target / "generation_config.json").is_symlink()


def test_the_model_itself_under_another_name_is_no_tokenizer_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = converted(tmp_path)
    shutil.copytree(make_tokenizer(tmp_path / "source"), target, dirs_exist_ok=True)
    (tmp_path / "alias").mkdir()
    with mounted("--bind", str(target), str(tmp_path / "alias")):
        assert main(["tokenizer", str(tmp_path / "alias"), str(target), "--overwrite"]) == 2
    assert "SRC and DST are the same directory" in capsys.readouterr().err
