import pytest
import torch

from puna.engine import load as loading
from puna.engine.load import load
from puna.engine.params import SamplingParams
from puna.errors import CheckpointError
from puna.llama import hub
from puna.train.mesh import Compute


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    """A Hugging Face folder with bfloat16 weights."""
    root = tmp_path_factory.mktemp("load")
    tokenizer.save(root / "tokenizer")
    half = torch.bfloat16
    hub.save(model.state_dict(), model.config, root / "model", tokenizer_dir=root / "tokenizer", dtype=half)
    return root / "model"


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_sixteen_bit_weights_stay_where_they_are_faster(folder, monkeypatch, faster):
    monkeypatch.setattr(loading, "choose_compute", lambda name, device: Compute(faster, "told", 1.0))
    generator = load(folder)
    assert generator.model.head.dtype == faster
    prompt = generator.tokenizer.encode("the llama", bos=True)
    assert generator.generate([prompt], params=SamplingParams(4, 0))[0].tokens


def test_a_dtype_that_is_asked_for(folder):
    assert load(folder, torch.bfloat16).model.head.dtype == torch.bfloat16


def test_a_folder_without_tokenizer(tmp_path, model):
    hub.save(model.state_dict(), model.config, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\. Put its tokenizer\.json or tokenizer\.model"):
        load(tmp_path / "model")
