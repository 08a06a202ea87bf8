import torch
from transformers.activations import ACT2FN

from model.activations import XIELU, activation


def test_squared_relu_is_that_of_transformers() -> None:
    x = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(activation("relu_squared")(x), ACT2FN["relu2"](x))


def test_xielu_is_that_of_transformers_with_its_weights_already_positive() -> None:
    x, theirs, ours = torch.linspace(-3, 3, 61), ACT2FN["xielu"].float(), activation("xielu")
    assert isinstance(ours, XIELU)
    theirs.alpha_p.data.fill_(0.3)
    theirs.alpha_n.data.fill_(-0.7)
    ours.positive.data = torch.nn.functional.softplus(theirs.alpha_p.data)
    ours.negative.data = 0.5 + torch.nn.functional.softplus(theirs.alpha_n.data)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
