"""Golden numeric cases: one formula, its inputs, its value and its gradients, in float64.

    case = load("preference")["dpo_sigmoid"]
    loss = dpo_loss(case.w, case.l, case.rw, case.rl, beta=case.beta).mean()
    case.check(loss)

Each file is a family. A case holds `spec` (the formula in words), `params`, `inputs`, `outputs` and
`grads` of the loss with respect to inputs; they were computed outside of this project, from the
papers' formulas, and their gradients compared with central differences.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

FOLDER = Path(__file__).parent
TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


class Case(SimpleNamespace):
    """Inputs as tensors and parameters as numbers, by name; those with a gradient require it."""

    def __init__(self, raw: dict):
        tensors = {name: _tensor(value) for name, value in raw["inputs"].items()}
        for name in raw["grads"]:
            tensors[name].requires_grad_()
        super().__init__(**raw["params"], **tensors)
        self._outputs, self._grads = raw["outputs"], raw["grads"]

    def expected(self, name: str) -> torch.Tensor:
        return _tensor(self._outputs[name])

    def output_names(self) -> set[str]:
        return set(self._outputs)

    def check(self, loss: torch.Tensor, name: str = "loss") -> None:
        """`loss` and its gradients are the case's, to 1e-9."""
        self.check_output(loss, name)
        if self._grads:
            loss.backward()
        for name, expected in self._grads.items():
            torch.testing.assert_close(getattr(self, name).grad, _tensor(expected), **TOLERANCE)

    def check_output(self, value: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(value.detach(), self.expected(name), **TOLERANCE)


def load(family: str) -> dict[str, Case]:
    """The cases of `<family>.json` by id, with fresh tensors."""
    return {raw["id"]: Case(raw) for raw in json.loads((FOLDER / f"{family}.json").read_text())}


def _tensor(value) -> torch.Tensor:
    """Floats in float64 from the first digit on; integers and booleans as they are."""
    tensor = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if tensor.is_floating_point() else tensor
