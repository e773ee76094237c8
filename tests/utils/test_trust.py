"""Files of others run no code: each case is a file that leaves a mark where its code has run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from prlhf_lightning import Generator, PersonalizedLM
from prlhf_lightning.cli.main import main
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.inference import GenerationRequest
from prlhf_lightning.training import checkpoint_files

FIXTURE = Path(__file__).parents[1] / "fixtures/format_1.ckpt"
MODULE = """
open({mark!r}, "w").close()
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from prlhf_lightning import CausalLMPolicy, IndividualUserModel, SimulatedSource
from prlhf_lightning.losses import BCOLoss

class Loss(BCOLoss): pass
class Users(IndividualUserModel): pass
class Policy(CausalLMPolicy): pass
class Source(SimulatedSource): pass
class Watch(Callback): pass
class Log(CSVLogger): pass
def score(prompt, answer): return 1.0
"""


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def others(tmp_path, mark, monkeypatch):
    """The name of somebody's module, which can be imported and has not been."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "others_code", raising=False)
    (tmp_path / "others_code.py").write_text(MODULE.format(mark=str(mark)))
    yield "others_code"
    sys.modules.pop("others_code", None)


def crafted(folder: Path, settings=None, **entries) -> Path:
    content = torch.load(FIXTURE, weights_only=True)
    content["hyper_parameters"].update(settings or {})
    path = folder / "run/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_files.save({**content, **entries}, path)
    return path


def parts(name):
    return {"class_path": "prlhf_lightning.user_models.CompositeUserModel", "init_args": {"parts": [name]}}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"class_path": "others_code.Loss"}},
        {"policy": {"class_path": "others_code.Policy", "init_args": {"model": "builtin:style-lm"}}},
        {"user_model": parts({"class_path": "others_code.Users"})},
        {"loss": "others_code.Loss"},
        {"loss": "{class_path: others_code.Loss}"},
        {"user_model": parts("others_code.Users")},
        {"optim": {"class_path": "others_code.Loss"}},
    ],
)
def test_a_checkpoint_imports_no_class_of_others(settings, others, mark, tmp_path):
    path = crafted(tmp_path, settings)
    with pytest.raises(ConfigurationError, match=rf"names {others}\.\w+, not of this package"):
        PersonalizedLM.load_from_checkpoint(path)
    with pytest.raises(SystemExit, match=rf"`--trust_classes {others}\.\w+`|loss is of type str"):
        main(["generate", "--model", str(path), "--prompt", "I"])
    assert not mark.exists()


def test_nor_does_one_hidden_where_old_lightning_kept_settings(others, mark, tmp_path):
    path = crafted(tmp_path)
    content = torch.load(path, weights_only=True)
    content["module_arguments"] = {"loss": {"class_path": f"{others}.Loss"}}
    del content["hyper_parameters"]["loss"]
    checkpoint_files.save(content, path)
    with pytest.raises(ConfigurationError, match=f"{others}.Loss"):
        PersonalizedLM.load_from_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "path",
    ["os.system", "builtins.eval", "subprocess.Popen", "posix.system", "prlhf_lightning.cli.main.main", "a..b",
     "prlhf_lightning.cli.parser.sys.exit", "lightning.pytorch.cli.LightningCLI", "x.y; reboot", "a" * 300 + ".b"],
)  # fmt: skip
def test_what_is_no_component_is_refused_without_trust_advice(path, tmp_path):
    checkpoint = crafted(tmp_path, {"loss": {"class_path": path, "init_args": {"args": "x"}}})
    with pytest.raises(SystemExit, match="which is not part of any model") as refused:
        main(["generate", "--model", str(checkpoint), "--prompt", "I"])
    assert "trust_classes" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_one_message_names_all_classes(others, tmp_path):
    path = crafted(tmp_path, {"loss": {"class_path": f"{others}.Loss"}, "user_model": parts({"class_path": "b.C"})})
    with pytest.raises(
        SystemExit, match=rf"`--trust_classes {others}\.Loss b\.C`|`--trust_classes b\.C {others}\.Loss`"
    ):
        main(["export", "--model", str(path), "--output", str(tmp_path / "out")])


def test_an_argument_is_consent(others, tmp_path):
    path = crafted(tmp_path, {"loss": {"class_path": f"{others}.Loss"}})
    main(
        [
            "generate",
            "--model",
            str(path),
            "--prompt",
            "I",
            "--max_new_tokens",
            "1",
            "--trust_classes",
            f"{others}.Loss",
        ]
    )
    del sys.modules[others]
    assert type(PersonalizedLM.load_from_checkpoint(path, trust_classes=[f"{others}.Loss"]).loss).__module__ == others


def test_a_class_that_has_been_imported_needs_none(others, tmp_path):
    __import__(others)
    loss = PersonalizedLM.load_from_checkpoint(crafted(tmp_path, {"loss": {"class_path": f"{others}.Loss"}})).loss
    assert type(loss).__module__ == others


def test_a_trusted_class_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"trust_classes: 'nowhere\.Loss' can't be imported"):
        PersonalizedLM.load_from_checkpoint(crafted(tmp_path), trust_classes=["nowhere.Loss"])


def pool(score):
    return {
        "class_path": "PoolSource",
        "init_args": {"pool": "x.jsonl", "groups": [{"x": 1.0}], "scores": {"x": score}},
    }


@pytest.mark.parametrize(
    "config",
    [
        {"trainer": {"callbacks": [{"class_path": "others_code.Watch"}]}},
        {"trainer": {"callbacks": ["others_code.Watch"]}},
        {"trainer": {"logger": {"class_path": "others_code.Log", "init_args": {"save_dir": "x"}}}},
        {"trainer": {"plugins": [{"class_path": "others_code.Watch"}]}},
        {
            "trainer": {
                "callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "others_code.score"}}]
            }
        },
        {"model": {"loss": "others_code.Loss"}},
        {"model": {"loss": "included.yaml"}},
        {"data": {"source": {"class_path": "others_code.Source"}}},
        {"data": {"source": pool("others_code.score")}},
        {"data": {"chat_template_args": {"x": {"class_path": "others_code.Loss"}}}},
    ],
)
def test_a_runs_configuration_imports_no_class_of_others(config, others, mark, tmp_path, monkeypatch):
    path = crafted(tmp_path)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run/included.yaml").write_text(f"class_path: {others}.Loss")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"names others_code\.\w+, .*: `--config run/config.yaml`"):
        main(["validate", "--ckpt_path", str(path.relative_to(tmp_path))])
    assert not mark.exists()


def test_a_configuration_that_the_user_names_is_consent(others, mark, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"loss": {"class_path": f"{others}.Loss"}}}))
    with pytest.raises(SystemExit):  # for want of everything else
        main(["validate", "--config", str(config), "--ckpt_path", str(crafted(tmp_path))])
    assert mark.exists()


def test_a_checkpoint_cannot_be_called_as_a_class(others, mark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURE, f"{others}.ckpt")
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": f"{others}.ckpt"}]}}))
    with pytest.raises(SystemExit, match=f"names {others}.ckpt"):
        main(["validate", "--ckpt_path", f"{others}.ckpt"])
    assert not mark.exists()


def test_a_report_imports_no_class_of_the_runs_configuration(others, mark, tmp_path):
    path = crafted(tmp_path)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": {"source": {"class_path": f"{others}.Source"}}}))
    with pytest.raises(SystemExit, match=rf"`--trust_classes {others}\.Source`"):
        main(["report", "--model", str(path), "--output", str(tmp_path / "r.html"), "--device", "cpu"])
    assert not mark.exists()


class Marks:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def pickled(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"lora_A.weight": Marks(mark)}, buffer)
    return buffer.getvalue()


def test_a_runs_configuration_cannot_unpickle_its_checkpoint(mark, tmp_path, votes):
    content = torch.load(FIXTURE, weights_only=True)
    path = crafted(tmp_path)
    torch.save({**content, "x": Marks(mark)}, path)
    settings = {key: content["hyper_parameters"][key] for key in ("user_model", "policy", "loss")}
    source = {"class_path": "FileSource", "init_args": {"train": str(votes), "validation": str(votes)}}
    config = {"model": settings, "data": {"source": source}, "weights_only": False}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="holds more than weights and settings"):
        main(["validate", "--ckpt_path", str(path), "--trainer.default_root_dir", str(tmp_path / "runs")])
    assert not mark.exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for name, adapters in (("whole", "false"), ("adapters", "true")):
        main(["export", "--model", str(FIXTURE), "--output", str(root / name), "--adapters", adapters])
    return root


def changed(folder: Path, name: str, to: Path, files: dict[str, object]) -> Path:
    """Return a copy of an exported folder with other files: settings are added, None removes a file."""
    folder = Path(shutil.copytree(folder / name, to / "export"))
    for name, value in ({"prlhf.json": {"format": 1, "sha256": {}}} | files).items():  # which has no checksums
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if value is None:
            path.unlink()
        elif isinstance(value, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | value))
        else:
            path.write_bytes(value if isinstance(value, bytes) else str(value).encode())
    return folder


OWN_LIBRARY = {"base_model_class": "Loss", "parent_library": "others_code"}
OWN_TOKENIZER = {"AutoTokenizer": ["others_code.Loss"] * 2}
OWN_CODE = {"AutoConfig": "others_code.Loss", "AutoModelForCausalLM": "others_code.Loss"}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("whole", {"prlhf.json": {"user_model": {"class_path": "others_code.Users"}}}),
        ("whole", {"prlhf.json": {"user_model": parts({"class_path": "others_code.Users"})}}),
        ("adapters", {"adapter_config.json": {"megatron_config": {"a": 1}, "megatron_core": "others_code"}}),
        ("adapters", {"adapter_config.json": {"auto_mapping": OWN_LIBRARY}}),
        ("adapters", {"adapter_model.safetensors": None, "adapter_model.bin": pickled}),
        ("whole", {"model.safetensors": None, "pytorch_model.bin": pickled}),
        ("whole", {"training_args.bin": pickled, "optimizer.pt": pickled}),
        ("whole", {"config.json": {"model_type": "own", "auto_map": OWN_CODE}}),
        ("whole", {"config.json": {"auto_map": OWN_CODE}}),
        ("whole", {"config.json": {"quantization_config": {"quant_method": "others_code"}}}),
        ("whole", {"tokenizer_config.json": {"tokenizer_class": "Loss", "auto_map": OWN_TOKENIZER}}),
        ("whole", {"tokenizer_config.json": {"tokenizer_class": "others_code.Loss"}}),
        ("whole", {"config.json": {"dtype": "others_code.Loss"}}),
        ("whole", {"custom_generate/generate.py": MODULE, "generation_config.json": {"custom_generate": "."}}),
        ("whole", {"chat_template.jinja": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}"}),
    ],
)  # fmt: skip
def test_an_exported_folder_runs_no_code(name, files, exported, others, mark, tmp_path, monkeypatch):
    files = {key: value(mark) if callable(value) else value for key, value in files.items()}
    files = {
        key: value.replace("MARK", str(mark)).replace("{mark!r}", repr(str(mark))) if isinstance(value, str) else value
        for key, value in files.items()
    }
    folder = changed(exported, name, tmp_path, {**files, "others_code.py": MODULE.format(mark=str(mark))})
    monkeypatch.chdir(folder)
    with suppress(PRLHFError):
        writer = Generator.from_folder(folder)
        writer.generate([GenerationRequest("I", chat_template="chat_template.jinja" in files, max_new_tokens=1)])
    assert not mark.exists()


def test_what_is_pickled_leaves_a_mark_where_it_is_trusted(mark):
    pickle.loads(pickle.dumps(Marks(mark)))
    assert mark.exists()


@pytest.mark.parametrize("value", ["others/kernel", {"": "sdpa", "text_config": "others/kernel"}])
def test_a_model_that_asks_for_hub_attention_code_is_refused(value, exported, tmp_path):
    folder = changed(exported, "whole", tmp_path, {"config.json": {"attn_implementation": value}})
    with pytest.raises(
        ConfigurationError, match=r"asks for code from the hub \(attn_implementation: 'others/kernel'\)"
    ):
        Generator.from_folder(folder)


def test_the_argument_lets_an_exported_folder_name_a_user_model(exported, others, tmp_path):
    settings = json.loads((exported / "whole/prlhf.json").read_text())
    first = settings["user_model"]["init_args"]["parts"][0]
    assert first["class_path"].endswith("IndividualUserModel")
    first["class_path"] = f"{others}.Users"
    folder = changed(exported, "whole", tmp_path, {"prlhf.json": {"user_model": settings["user_model"], "format": 1}})
    writer = Generator.from_folder(folder, trust_classes=[f"{others}.Users"])
    assert type(next(iter(writer.user_model.children()))[0]).__module__ == others


def test_only_what_users_name_is_imported_from_the_folder(mark, tmp_path):
    for name in ("torch", "jsonargparse", "lightning", "transformers", "yaml", "wandb", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})")
    (tmp_path / "mine.py").write_text(f"open({str(mark)!r}, 'a').write('mine')\n" + MODULE[MODULE.index("from") :])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_text(yaml.safe_dump({"model": {"loss": {"class_path": "mine.Loss"}}}))
    words = ["-m", "prlhf_lightning", "fit", "--config", "configs/mine.yaml", "--print_config"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert "class_path: mine.Loss" in done.stdout, done.stderr
    assert mark.read_text() == "mine"
