import torch

from convpare.blocks import digits_net, train_digits
from convpare.data import load_data
from convpare.evaluation import evaluate


def test_network_has_something_of_every_kind_to_prune():
    model = digits_net()
    assert sum(p.numel() for p in model.parameters()) == 96_074
    assert any(m.groups == m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_training_reaches_its_accuracy():
    calls: list[tuple[int, int]] = []
    model, history = train_digits(on_progress=lambda done, total: calls.append((done, total)))
    assert not any(m.training for m in model.modules())
    assert [epoch.number for epoch in history] == list(range(1, 21))
    assert calls == [(n, 20) for n in range(1, 21)]
    assert history[-1].train_top1 > 99
    assert history[-1].loss < 0.05
    test = load_data("digits").test
    assert test is not None
    assert evaluate(model, test).top1 >= 97.5


def test_training_repeats_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, _ = train_digits(seed=3, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.rand(7)
    second, _ = train_digits(seed=3, epochs=1)
    other, _ = train_digits(seed=4, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.fc.weight, other.fc.weight)
