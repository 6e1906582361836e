"""Questions about the natural gradient: a proper optimiser, that moves everything, and arrives."""

import copy
import io
import math
import pickle
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gaborium import Gabor2d, GaborConv2d, MixedConv
from gaborium.functions.params import RECORDS
from gaborium.layers import LAYERS
from gaborium.optim import NaturalGradient
from gaborium.optim.kernel_family import KernelFamily

SIZES = {1: (60,), 2: (18, 20), 3: (9, 8, 9)}


def layer_of(n_dims: int = 2, channels: int = 1, filters: int = 4, k: int = 5, **kwargs):
    return LAYERS[n_dims](channels, filters, k, **{"start": "random", "seed": 0} | kwargs)


def model_of(**kwargs) -> nn.Sequential:
    return nn.Sequential(layer_of(2, 2, **kwargs), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def small_net(**kwargs) -> nn.Sequential:
    """A Gabor layer of 6 x 6 responses and a linear one, on images of 2 x 10 x 10."""
    torch.manual_seed(3)
    first = layer_of(2, 2, **{"bias": False} | kwargs)
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))


def batches(n: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(size, 2, 10, 10, generator=draw).cumsum(-1) / 3,
            torch.randint(3, (size,), generator=draw),
        )
        for _ in range(n)
    ]


def gabor_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(model, optimizer, data, forward=None) -> None:
    for images, labels in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy((forward or model)(images), labels)
        loss.backward()
        optimizer.step()


def evidence_of(optimizer) -> list[dict[str, Tensor]]:
    """What the optimiser remembers, in the order of its layers."""
    states = optimizer.state_dict()["state"]
    return [states[key] for key in sorted(states)]


def assert_same(one, other) -> None:
    """Equal to the bit, whatever it is made of."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


# -- a proper optimiser ---------------------------------------------------------------------------


def test_it_is_an_optimizer():
    model = small_net()
    optimizer = NaturalGradient(model, lr=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "NaturalGradient" in repr(optimizer)
    assert "lr: 0.5" in repr(optimizer)
    assert optimizer.defaults["lr"] == 0.5
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model[0].parameters()} <= held
    assert not {id(p) for p in model[3].parameters()} & held


def test_the_bias_belongs_to_the_rest():
    layer = layer_of(bias=True)
    held = {id(p) for g in NaturalGradient(layer).param_groups for p in g["params"]}
    assert id(layer.bias) not in held


def test_groups_have_rates_of_their_own():
    still, moving, later = layer_of(seed=1), layer_of(seed=2), layer_of(seed=3)
    optimizer = NaturalGradient(
        [{"layers": [still], "lr": 0.0}, {"layers": moving}], lr=0.7, momentum=0.5
    )
    optimizer.add_param_group({"layers": [later], "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.7, 0.2]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5] * 3
    before = [gabor_state(layer) for layer in (still, moving, later)]
    for _ in range(12):
        optimizer.zero_grad()
        image = torch.randn(2, 1, 12, 12)
        sum(layer(image).square().mean() for layer in (still, moving, later)).backward()
        optimizer.step()
    after = [gabor_state(layer) for layer in (still, moving, later)]
    assert_same(before[0], after[0])
    for was, now in zip(before[1:], after[1:], strict=True):
        assert not torch.equal(was["log_sigma"], now["log_sigma"])


def test_a_layer_cannot_be_in_two_groups():
    layer = layer_of()
    optimizer = NaturalGradient(layer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"layers": [layer]})


def test_zero_grad_forgets_the_gradient_of_the_kernels():
    layer = layer_of()
    optimizer = NaturalGradient(layer)
    layer(torch.randn(1, 1, 9, 9)).sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    before = gabor_state(layer)
    optimizer.step()
    assert_same(before, gabor_state(layer))


def test_closures_are_evaluated_with_gradients():
    layer = layer_of()
    optimizer = NaturalGradient(layer)
    image, before = torch.randn(2, 1, 9, 9), layer.even.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(image).square().mean()
        loss.backward()
        return loss

    expected = layer(image).square().mean()
    assert torch.equal(optimizer.step(closure), expected)
    assert not torch.equal(layer.even, before)


def test_schedulers_set_the_rate():
    layer = layer_of()
    optimizer = NaturalGradient(layer, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    layer(torch.randn(1, 1, 9, 9)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_hooks_are_called():
    layer, calls = layer_of(), []
    optimizer = NaturalGradient(layer)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_smaller_rate_goes_a_share_of_the_way():
    images = batches(1)[0]
    moves = []
    for lr in (0.25, 1.0):
        model = small_net()
        before = KernelFamily(model[0]).read()
        optimizer = NaturalGradient(model, lr=lr)
        train(model, optimizer, [images])
        moves.append(KernelFamily(model[0]).read() - before)
    # The parameters are rounded to single precision.
    torch.testing.assert_close(moves[0], 0.25 * moves[1], rtol=1e-3, atol=1e-6)
    assert moves[1].abs().max() > 1e-3


@pytest.mark.parametrize("way", ["as it is", "saved"])
def test_resumed_training_is_the_uninterrupted_one(way):
    data = batches(20)
    whole = small_net()
    optimizer = NaturalGradient(whole)
    train(whole, optimizer, data)

    half = small_net()
    first = NaturalGradient(half)
    train(half, first, data[:10])
    checkpoint = {"model": half.state_dict(), "optimizer": first.state_dict()}
    if way == "saved":
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)
    else:
        checkpoint = copy.deepcopy(checkpoint)
    fresh = small_net(seed=9)
    second = NaturalGradient(fresh, lr=0.1)
    fresh.load_state_dict(checkpoint["model"])
    second.load_state_dict(checkpoint["optimizer"])
    assert_same(second.state_dict(), checkpoint["optimizer"])
    train(fresh, second, data[10:])
    assert_same(gabor_state(fresh), gabor_state(whole))
    assert_same(second.state_dict(), optimizer.state_dict())


def test_the_models_state_dict_has_no_trace_of_it():
    model = small_net()
    before = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    train(model, NaturalGradient(model), batches(2))
    assert list(model.state_dict()) == before
    assert [name for name, _ in model.named_parameters()] == names


def test_a_trained_model_can_be_copied():
    model = small_net()
    train(model, NaturalGradient(model), batches(2))
    images = batches(1)[0][0]
    assert torch.equal(copy.deepcopy(model)(images), model(images))


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_an_optimizer_travels_with_its_model(way):
    data = batches(6)
    model = small_net()
    optimizer = NaturalGradient(model)
    train(model, optimizer, data[:3])
    if way == "copied":
        twin, theirs = copy.deepcopy((model, optimizer))
    else:
        twin, theirs = pickle.loads(pickle.dumps((model, optimizer)))
    before = gabor_state(model)
    train(twin, theirs, data[3:])
    assert_same(gabor_state(model), before)
    train(model, optimizer, data[3:])
    assert_same(gabor_state(model), gabor_state(twin))


# -- how gradients come about ---------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_big_batch():
    data = batches(12)
    models, evidence = [], []
    for parts in (1, 4):
        model = small_net().double()
        optimizer = NaturalGradient(model)
        for images, labels in data:
            optimizer.zero_grad()
            for x, y in zip(images.double().chunk(parts), labels.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
        models.append(gabor_state(model))
        evidence.append(evidence_of(optimizer)[0])
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(evidence[1]["gradient"], evidence[0]["gradient"])


def test_a_layer_used_twice_gets_both_gradients():
    layer = layer_of(bias=False).double()
    twin = copy.deepcopy(layer)
    one, two = NaturalGradient(layer), NaturalGradient(twin)
    images = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    for _ in range(12):
        one.zero_grad()
        (layer(images[:2]).square().mean() + layer(images[2:]).square().mean()).backward()
        one.step()
        two.zero_grad()
        (2 * twin(images).square().mean()).backward()
        two.step()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-7, atol=1e-9)


def test_evaluation_between_steps_changes_nothing():
    data, models = batches(12), []
    for disturbed in (False, True):
        model = small_net()
        optimizer = NaturalGradient(model, patch_interval=1)
        for images, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            if disturbed:
                with torch.no_grad():
                    model.eval()(torch.full((1, 2, 10, 10), 1e4))
                model.train()
            optimizer.step()
        models.append(gabor_state(model))
    assert_same(*models)


def test_a_filter_without_a_finite_gradient_waits_alone(photograph):
    # The root of a squared error has no slope at an exact hit.
    image, target, layer = photograph[..., 100:160, 150:210], planted(4, 100), planted(4, 0)
    with torch.no_grad():
        for name, value in layer.state_dict(keep_vars=True).items():
            value[2] = target.state_dict()[name][2]
    wanted, before = target(image).detach(), gabor_state(layer)
    optimizer = NaturalGradient(layer)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(image) - wanted).square().mean((0, 2, 3)).sqrt().sum().backward()
        optimizer.step()
    assert all(torch.equal(value[2], before[name][2]) for name, value in gabor_state(layer).items())
    errors = kernel_errors(layer, target)
    assert (errors < 0.1).sum() >= 3, errors


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing(value):
    model, data = small_net(), batches(3)
    optimizer = NaturalGradient(model)
    train(model, optimizer, data[:2])
    before, state = gabor_state(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    (value * model(data[2][0]).sum()).backward()
    optimizer.step()
    assert_same(gabor_state(model), before)
    assert_same(optimizer.state_dict(), state)
    train(model, optimizer, data[2:])
    assert not torch.equal(gabor_state(model)["0.even"], before["0.even"])


def test_an_input_that_is_not_finite_changes_nothing():
    model, data = small_net(), batches(3)
    optimizer = NaturalGradient(model, patch_interval=1)
    train(model, optimizer, data[:2])
    before, state = gabor_state(model), copy.deepcopy(optimizer.state_dict())
    images = data[2][0].clone()
    images[0, 0, 0, 0] = math.inf
    optimizer.zero_grad()
    # The loss never sees the image with the infinite pixel.
    model(images)[1:].square().sum().backward()
    optimizer.step()
    assert_same(gabor_state(model), before)
    assert_same(optimizer.state_dict(), state)


def test_scaled_gradients_are_unscaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    data, models = batches(6), []
    for scaled in (False, True):
        model = small_net()
        optimizer = NaturalGradient(model)
        for images, labels in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if scaled:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        models.append(gabor_state(model))
    # The scale is a power of two, which no rounding can see.
    assert_same(*models)


def test_autocast_trains_nearly_as_without():
    data, models = batches(8), []
    start = gabor_state(small_net())
    for enabled in (False, True):
        model = small_net()
        optimizer = NaturalGradient(model)

        def forward(images: Tensor, model=model, enabled=enabled) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return model(images).float()

        train(model, optimizer, data, forward)
        models.append(gabor_state(model))
    moved = (models[0]["0.even"] - start["0.even"]).norm()
    # bfloat16 keeps 8 bits: gradients are wrong by a percent, the path by some.
    assert (models[1]["0.even"] - models[0]["0.even"]).norm() < 0.3 * moved
    assert models[1]["0.even"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_learn(dtype):
    model = small_net().to(dtype)
    before = gabor_state(model)
    optimizer = NaturalGradient(model)
    train(model, optimizer, [(images.to(dtype), labels) for images, labels in batches(3)])
    after = gabor_state(model)
    assert after["0.even"].dtype == dtype
    assert not torch.equal(after["0.even"], before["0.even"])
    assert all(value.isfinite().all() for value in after.values())


def test_compiled_models_take_the_same_steps():
    data, models = batches(6), []
    for compiled in (False, True):
        model = small_net()
        optimizer = NaturalGradient(model)
        with warnings.catch_warnings():
            # What torch's own compiler imports is deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            train(model, optimizer, data, forward)
        models.append(gabor_state(model))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-5, atol=1e-6)


def _train_distributed(rank: int, port: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    try:
        half = slice(4 * rank, 4 * rank + 4)
        data = [(images[half].double(), labels[half]) for images, labels in batches(12)]
        for order in ("wrapped before", "wrapped after"):
            model = small_net().double()
            if order == "wrapped before":
                wrapped = nn.parallel.DistributedDataParallel(model)
                optimizer = NaturalGradient(wrapped)
            else:
                optimizer = NaturalGradient(model)
                wrapped = nn.parallel.DistributedDataParallel(model)
            train(model, optimizer, data, wrapped)
            result = {"model": gabor_state(model), "optimizer": optimizer.state_dict()}
            torch.save(result, f"{folder}/{order}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = mp.get_context("spawn").Process(
        target=_train_distributed, args=(1, port, str(tmp_path))
    )
    other.start()
    _train_distributed(0, port, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    model = small_net().double()
    train(model, NaturalGradient(model), [(x.double(), y) for x, y in batches(12)])
    alone = gabor_state(model)
    for order in ("wrapped before", "wrapped after"):
        ranks = [torch.load(tmp_path / f"{order}-{i}.pt", weights_only=True) for i in (0, 1)]
        assert_same(*ranks)
        for name, value in ranks[0]["model"].items():
            # The sums are added in another order.
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-8)


# -- everything moves -----------------------------------------------------------------------------

EVERYTHING = [
    *({"n_dims": n, "coordinates": c} for n in (1, 2, 3) for c in ("textbook", "wavevector")),
    *({"n_dims": n, "geometry": "pair"} for n in (1, 2, 3)),
    {"learn": RECORDS[2].field_names()},
    {"learn": RECORDS[3].field_names(), "n_dims": 3},
    {"learn": RECORDS[2].field_names(), "geometry": "pair", "coordinates": "textbook"},
    *({"learn": (name,)} for name in RECORDS[2].field_names()),
    {"learn": ("orientation", "phase")},
    {"learn": ("wavelength", "sigma"), "coordinates": "textbook"},
    {"groups": 2},
    {"groups": 2, "geometry": "pair", "output": "energy"},
    {"stride": 2},
    {"dilation": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2, "dilation": 2},
    {"output": "quadrature"},
    {"output": "energy"},
    {"output": "energy", "n_dims": 1},
    {"unit_norm": True},
    {"dc": "remove"},
    {"dc": "remove", "unit_norm": True, "output": "quadrature"},
    {"min_wavelength": 2.5},
    {"start": "bank"},
    {"start": "v1"},
    {"bias": False},
]


def name_of(arguments: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items())


@pytest.mark.parametrize("arguments", EVERYTHING, ids=name_of)
def test_what_learns_moves_and_what_does_not_stays(arguments):
    kwargs = dict(arguments)
    n_dims = kwargs.pop("n_dims", 2)
    layer = layer_of(n_dims, channels=2, k=3 if n_dims == 3 else 5, **kwargs)
    optimizer = NaturalGradient(layer, global_step_interval=3)
    moving = {n: v.detach().clone() for n, v in layer.named_parameters() if n != "bias"}
    still = {name: value.clone() for name, value in layer.named_buffers()}
    bias = None if layer.bias is None else layer.bias.detach().clone()
    # Not alike along its axes, or else no direction is better than another.
    images = torch.randn(3, 2, *SIZES[n_dims]).cumsum(-1)
    if n_dims > 1:
        images = images + torch.randn(3, 2, *SIZES[n_dims]).cumsum(-2) / 2
    for _ in range(4):
        optimizer.zero_grad()
        responses = layer(images)
        (responses - responses.detach().roll(1, -1).roll(1, 1)).square().mean().backward()
        optimizer.step()
    for name, value in moving.items():
        now = getattr(layer, name)
        assert now.isfinite().all()
        assert ((now - value).abs().flatten(1).amax(1) > 0).all(), name
    for name, value in still.items():
        assert torch.equal(getattr(layer, name), value), name
    if bias is not None:
        assert torch.equal(layer.bias, bias)


def test_the_gabor_part_of_a_mixed_layer_moves():
    layer = MixedConv(layer_of(2, 2), free=2, seed=0)
    optimizer = NaturalGradient(layer)
    before = gabor_state(layer)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.randn(2, 2, 12, 12)) - 1).square().mean().backward()
        optimizer.step()
    after = gabor_state(layer)
    for name, value in before.items():
        moves = name.startswith("gabor.") and not name.endswith("bias")
        assert torch.equal(after[name], value) != moves, name


def test_parameters_can_be_frozen_for_a_while():
    layer = layer_of()
    optimizer = NaturalGradient(layer, global_step_interval=2)
    image = torch.randn(2, 1, 12, 12, requires_grad=True)

    def step() -> dict[str, bool]:
        before = gabor_state(layer)
        optimizer.zero_grad()
        layer(image).square().mean().backward()
        optimizer.step()
        after = gabor_state(layer)
        return {name: not torch.equal(after[name], before[name]) for name in before}

    step()
    layer.log_sigma.requires_grad_(False)
    moved = [step() for _ in range(3)][-1]
    assert not moved["log_sigma"]
    assert moved["even"]
    layer.requires_grad_(False)
    assert not any(step().values())
    layer.requires_grad_(True)
    moved = step()
    assert moved["log_sigma"]
    assert moved["even"]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "kwargs", "error", "message"),
    [
        (lambda: nn.Conv2d(1, 2, 3), {}, TypeError, "got Conv2d"),
        (lambda: [nn.Conv2d(1, 2, 3)], {}, TypeError, "got Conv2d"),
        (lambda: layer_of().parameters(), {}, TypeError, "got Parameter"),
        (list, {}, ValueError, "learns anything"),
        (lambda: layer_of(learn=()), {}, ValueError, "learns anything"),
        (lambda: [{"params": list(layer_of().parameters())}], {}, ValueError, "key 'layers'"),
        (layer_of, {"lr": 1.5}, ValueError, r"lr must be in \[0, 1\], got 1.5"),
        (layer_of, {"lr": -0.1}, ValueError, "lr must be"),
        (layer_of, {"lr": math.nan}, ValueError, "lr must be"),
        (layer_of, {"momentum": 1.0}, ValueError, "momentum must be"),
        (layer_of, {"trust_radius": -1.0}, ValueError, "trust_radius must be"),
        (layer_of, {"damping": -1.0}, ValueError, "damping must be"),
        (
            layer_of,
            {"global_step_interval": 2.5},
            ValueError,
            "global_step_interval must be a whole number",
        ),
        (
            layer_of,
            {"global_step_interval": math.inf},
            ValueError,
            "global_step_interval must be a whole number",
        ),
        (
            layer_of,
            {"patch_interval": 0},
            ValueError,
            "patch_interval must be a whole number from 1",
        ),
        (
            lambda: [{"layers": [layer_of()], "lr": 7.0}],
            {},
            ValueError,
            "lr must be",
        ),
    ],
)
def test_bad_input_is_one_clear_line(layers, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        NaturalGradient(layers(), **kwargs)
    assert "\n" not in str(caught.value)


# -- it arrives -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """``(1, 1, 512, 512)``."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.camera()).float()[None, None] / 255


def planted(n: int, seed: int) -> GaborConv2d:
    return GaborConv2d(1, n, 11, bias=False, start="random", seed=seed)


def kernel_errors(layer, target) -> Tensor:
    one, other = layer.weight.detach().flatten(1), target.weight.detach().flatten(1)
    return (one - other).norm(dim=1) / other.norm(dim=1)


@pytest.mark.parametrize(("loss", "enough", "share"), [("mse", 0.005, 12), ("rmse", 0.05, 11)])
def test_planted_filters_come_back_from_one_random_start(loss, enough, share, photograph):
    # In single precision the order of sums decides how near a filter comes.
    image, target, layer = (
        part.double()
        for part in (photograph[..., 100:164, 150:214], planted(12, 100), planted(12, 0))
    )
    wanted = target(image).detach()
    optimizer = NaturalGradient(layer)
    for _ in range(40 if loss == "mse" else 60):
        optimizer.zero_grad()
        error = (layer(image) - wanted).square().mean((0, 2, 3))
        (error if loss == "mse" else error.sqrt()).sum().backward()
        optimizer.step()
    errors = kernel_errors(layer, target)
    assert (errors < enough).sum() >= share, errors


def test_noise_of_mini_batches_averages_out(photograph):
    target, layer = planted(12, 100), planted(12, 0)
    optimizer = NaturalGradient(layer)
    draw = torch.Generator().manual_seed(1)
    for _ in range(80):
        places = torch.randint(512 - 40, (4, 2), generator=draw).tolist()
        image = torch.cat([photograph[..., a : a + 40, b : b + 40] for a, b in places])
        wanted = target(image).detach()
        # As much noise as there is signal.
        spread = wanted.std((0, 2, 3), keepdim=True)
        wanted = wanted + spread * torch.randn(wanted.shape, generator=draw)
        optimizer.zero_grad()
        (layer(image) - wanted).square().mean((0, 2, 3)).sum().backward()
        optimizer.step()
    errors = kernel_errors(layer, target)
    assert (errors < 0.1).sum() >= 11, errors


def test_a_quarter_turn_is_found_and_kept_under_rmse(photograph):
    image = photograph[..., 60:130, 200:270]
    fields = {"wavelength": 6.0, "sigma": 3.0, "aspect_ratio": 0.5}
    target = GaborConv2d(
        1, 1, 15, bias=False, start=Gabor2d.of(orientation=[[math.pi / 4]], **fields)
    )
    start = Gabor2d.of(orientation=[[-math.pi / 4]], **fields)
    layer = GaborConv2d(1, 1, 15, bias=False, start=start, learn="orientation")
    wanted = target(image).detach()
    optimizer = NaturalGradient(layer)
    angles = []
    for _ in range(110):
        optimizer.zero_grad()
        (layer(image) - wanted).square().mean().sqrt().backward()
        optimizer.step()
        angles.append(layer.params.difference(target.params)["orientation"].abs().item())
    assert max(angles[-30:]) < 0.01, angles


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_image_changes_nothing_it_cannot_know(value):
    layer = layer_of(k=7, dc="remove", bias=False)
    optimizer = NaturalGradient(layer, global_step_interval=2)
    image = torch.full((2, 1, 16, 16), value)
    before = gabor_state(layer)
    for _ in range(6):
        optimizer.zero_grad()
        (0.0 * layer(image).square().mean()).backward()
        optimizer.step()
    assert_same(gabor_state(layer), before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_image_gives_no_nan(bias):
    layer = layer_of(k=7, bias=bias)
    optimizer = NaturalGradient(layer, global_step_interval=2)
    for _ in range(8):
        optimizer.zero_grad()
        (layer(torch.full((2, 1, 16, 16), 0.5)) - 1).square().mean().backward()
        optimizer.step()
    assert all(value.isfinite().all() for value in gabor_state(layer).values())


# -- rests and leaps ------------------------------------------------------------------------------


def test_older_filters_move_at_every_fourth_step(monkeypatch):
    monkeypatch.setattr("gaborium.optim.natural._WARMUP_STEPS", 2)
    model, data = small_net(bias=True), batches(9)
    optimizer = NaturalGradient(model)
    moved = []
    for batch in data:
        before = gabor_state(model)
        train(model, optimizer, [batch])
        moved.append(not torch.equal(before["0.even"], gabor_state(model)["0.even"]))
    assert moved == [True, True, False, True, False, False, False, True, False]


def test_gradients_between_two_moves_count_as_their_mean(monkeypatch):
    monkeypatch.setattr("gaborium.optim.natural._WARMUP_STEPS", 4)
    data, ends = batches(5), []
    for scales in ((1.0, 1.0, 1.0, 1.0), (4.0, 0.0, 0.0, 0.0)):
        model = small_net(bias=True)
        optimizer = NaturalGradient(model, global_step_interval=0)
        train(model, optimizer, data[:4])
        before = gabor_state(model)["0.even"]
        images, labels = data[4]
        for scale in scales:
            optimizer.zero_grad()
            (scale * nn.functional.cross_entropy(model(images), labels)).backward()
            optimizer.step()
        ends.append(gabor_state(model)["0.even"])
        assert not torch.equal(ends[-1], before)
    assert torch.allclose(*ends, atol=1e-5)


def before_global_steps(photograph: Tensor) -> tuple[GaborConv2d, NaturalGradient, Callable]:
    """A layer whose filters are about to take global steps, and a step of its training."""
    image, target, layer = photograph[..., 100:180, 150:230], planted(12, 100), planted(12, 0)
    wanted = target(image).detach()
    optimizer = NaturalGradient(layer)

    def step() -> None:
        optimizer.zero_grad()
        (layer(image) - wanted).square().mean((0, 2, 3)).sum().backward()
        optimizer.step()

    return layer, optimizer, step


def test_a_global_step_that_ended_higher_is_undone(photograph):
    layer, optimizer, step = before_global_steps(photograph)
    state = optimizer.state[layer.gradient_hook.kernel]
    while "pending" not in state:
        previous = layer.weight.detach().clone()
        step()
    taken = state["pending"]["taken"]
    assert taken.any()
    assert not taken.all()
    assert optimizer.n_global_steps == taken.sum()
    there = layer.weight.detach().clone()
    # The loss rises steeply along the step of the first of them.
    first = int(taken.nonzero()[0])
    optimizer.zero_grad()
    rise = torch.zeros_like(there).index_copy(
        0, torch.tensor([first]), there[[first]] - previous[[first]]
    )
    layer(photograph[..., 100:180, 150:230]).sum().mul(0.0).backward()
    layer.gradient_hook.kernel.grad.add_(1e6 * rise)
    optimizer.step()
    now = layer.weight.detach()
    assert (now - previous)[first].norm() < 0.5 * (there - previous)[first].norm()
    assert state["acceptance_factor"].tolist() == [2.0 if i == first else 1.0 for i in range(12)]
    others = taken.nonzero().flatten()[1:]
    assert ((now - there)[others].norm() < (now - previous)[others].norm()).all()
    assert "pending" not in state


def test_a_training_resumes_exactly_after_a_global_step(photograph):
    layer, optimizer, step = before_global_steps(photograph)
    while "pending" not in optimizer.state[layer.gradient_hook.kernel]:
        step()
    file = io.BytesIO()
    torch.save((layer.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    again, second, second_step = before_global_steps(photograph)
    for part, saved in zip((again, second), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    for _ in range(3):
        step()
        second_step()
    assert_same(gabor_state(again), gabor_state(layer))


def test_no_global_steps_once_the_rate_has_fallen(photograph):
    for rate, taken in ((1.0, True), (0.6, True), (0.3, False), (0.0, False)):
        layer, optimizer, step = before_global_steps(photograph)
        for _ in range(4):
            step()
        optimizer.param_groups[0]["lr"] = rate
        step()
        assert ("pending" in optimizer.state[layer.gradient_hook.kernel]) == taken, rate


@pytest.mark.parametrize("global_step_interval", [5, 0])
def test_filters_that_begin_alike_part_where_leaps_are_allowed(global_step_interval, photograph):
    torch.manual_seed(0)
    equal = Gabor2d.of(orientation=[0.8] * 8, wavelength=6.0, sigma=2.5)
    layer = GaborConv2d(1, 8, 9, start=equal, bias=False)
    network = nn.Sequential(
        layer, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    optimizer = NaturalGradient(layer, global_step_interval=global_step_interval)
    images = torch.cat([part for row in photograph.chunk(2, 2) for part in row.chunk(2, 3)])
    for step in range(4):
        optimizer.zero_grad()
        crops = images[..., 20 * step : 20 * step + 60, 30 * step : 30 * step + 60]
        nn.functional.cross_entropy(network(crops), torch.arange(4)).backward()
        optimizer.step()
    units = nn.functional.normalize(layer.weight.detach().flatten(1), dim=1)
    alike = (units @ units.T).abs().fill_diagonal_(0)
    again = optimizer.state[layer.gradient_hook.kernel].get("reinitializations", torch.zeros(8))
    if global_step_interval == 0:
        assert again.sum() == 0
        assert alike.amax(1).min() > 0.9
    else:
        assert again[0] == 0
        assert again.sum() >= 4
        assert alike.amax(1).median() < 0.9


def test_means_that_do_not_matter_are_not_asked_for(monkeypatch):
    data, ends, heard = batches(12), [], []
    for spared in (True, False):
        if not spared:
            monkeypatch.setattr(NaturalGradient, "_request_output_mean", lambda *_: None)
        torch.manual_seed(0)
        model = nn.Sequential(
            layer_of(2, 2, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(144, 3),
        )
        optimizer = NaturalGradient(model, patch_interval=2)
        for batch in data:
            train(model, optimizer, [batch])
            heard.append(model[0].gradient_hook.offset.grad is not None)
        ends.append(gabor_state(model))
    assert heard == [step in (1, 2, 4, 6, 8, 10, 12) for step in range(1, 13)] + [True] * 12
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=1e-5), name


def test_a_loaded_state_hears_as_the_saved_one_did():
    data = batches(6)
    model, other = (
        nn.Sequential(
            layer_of(2, 2, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
        )
        for _ in range(2)
    )
    optimizer = NaturalGradient(model, patch_interval=2)
    train(model, optimizer, data)
    assert not model[0].gradient_hook.needs_output_mean
    loaded = NaturalGradient(other, patch_interval=2)
    assert other[0].gradient_hook.needs_output_mean
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not other[0].gradient_hook.needs_output_mean
