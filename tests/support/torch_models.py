"""Models of PyTorch with weights drawn at random, so that every part matters.

PyTorch is imported where it is used: the tests that need it are skipped without it.
"""


def seeded(make, norms=1.0):
    """`make()` in evaluation, weights of size 0.3; of one axis, about `norms`."""
    import torch

    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn_like(weight) + norms * (weight.ndim == 1))
    return model.eval()


def outputs_of(model, text):
    """Its logits, as a NumPy array."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(text)).logits.numpy()


def draw_factors(model):
    """New values for all factors of a model of PEFT, in place."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
