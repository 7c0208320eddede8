"""What errors cost, and moments of what layers take in, against autograd and numpy one image at a time."""
import pytest
import torch
from segmenting_fixtures import pictures, small
from training_fixtures import images, one_thread, tiny  # noqa: F401

from vitlab.criteria.compensation import elimination_order
from vitlab.measure.moments import AT_ONCE, HEAVIEST, Fisher, each_moments, fisher, layers_of
from vitlab.measure.units import unit_scores
from vitlab.models import attention_block, shape_of
from vitlab.models.families import mixing_layer
from vitlab.runtime import parallel

CLASSES = 3
MODELS = {"class token": lambda: tiny(depth=3), "no prefix token": lambda: tiny(class_token=False, global_pool="avg"),
          "mean of patches": lambda: tiny(global_pool="avg"), "registers": lambda: tiny(reg_tokens=2),
          "segmenter": lambda: small("mask_transformer"), "linear segmenter": lambda: small("linear")}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]().eval()


def given_of(model, counts: tuple[int, ...] = (5, 3)) -> list[tuple[torch.Tensor, None]]:
    make = pictures if hasattr(model, "decoder") else images
    return [(make(count, seed=number), None) for number, count in enumerate(counts)]


def output_of(model, x: torch.Tensor) -> torch.Tensor:
    """(images or patches, classes) logits."""
    return model.patch_logits(x).flatten(2)[0].T if hasattr(model, "decoder") else model(x)


def gradients_slowly(model, batches, drawn: list[torch.Tensor]) -> dict:
    """{layer: [(N, D) of each image]}: of log p of the classes drawn, by what proj or fc2 give, one image at a time by
    autograd."""
    found, taken = {}, iter(torch.cat(drawn).flatten().tolist())
    for image in (image for x, _ in batches for image in x):
        outputs, handles = {}, []
        for layer in layers_of(model):
            linear = mixing_layer(attention_block(model.blocks[layer[0]]), layer[1])[0]
            handles.append(linear.register_forward_hook(lambda m, i, out, layer=layer,
                                                        outputs=outputs: outputs.update({layer: out})))
        logits = output_of(model, image[None])
        value = sum(row[next(taken)] - torch.logsumexp(row, dim=0) for row in logits)
        for layer, gradient in zip(outputs, torch.autograd.grad(value, list(outputs.values()), allow_unused=True)):
            found.setdefault(layer, []).append(torch.zeros_like(outputs[layer][0]) if gradient is None else gradient[0])
        for handle in handles:
            handle.remove()
    return found


def watch_draws(monkeypatch) -> tuple[list, list]:
    """(what torch.multinomial is given, what it gives) from here on."""
    given, drawn, plain = [], [], torch.multinomial

    def watched(weights, *args, **settings):
        given.append(weights)
        drawn.append(plain(weights, *args, **settings))
        return drawn[-1]
    monkeypatch.setattr(torch, "multinomial", watched)
    return given, drawn


def test_what_errors_cost_is_the_mean_of_outer_products_of_gradients_at_classes_drawn_from_the_models_own(model,
                                                                                                          monkeypatch):
    batches, (given, drawn) = given_of(model), watch_draws(monkeypatch)
    found = fisher(model, batches, progress=False)
    wanted = torch.cat([output_of(model, image[None]).softmax(dim=1) for x, _ in batches for image in x]).detach()
    # y is drawn from p(y | x)
    torch.testing.assert_close(torch.cat(given), wanted, rtol=1e-5, atol=1e-6)
    assert list(found) == layers_of(model)
    prefix = shape_of(model).num_prefix_tokens
    for layer, rows in gradients_slowly(model, batches, drawn).items():
        metric = sum(torch.outer(g, g) for image in rows for g in image.double())
        scale = float(metric.abs().max())
        # float32 sums in another order
        assert torch.allclose(found[layer].metric.double(), metric, rtol=0, atol=1e-5 * scale)
        squares = torch.stack(rows).square().sum(dim=2)                                         # (images, N)
        heavy, light = (float(part.mean()) if part.numel() else 0.0
                        for part in (squares[:, :prefix], squares[:, prefix:]))
        ratio = heavy / light if light else float("inf") if heavy else 0.0
        assert found[layer].prefix_weight == pytest.approx(min(max(ratio, 1.0), HEAVIEST), rel=1e-4)
        root = found[layer].root()
        assert torch.allclose(root.T @ root, metric, rtol=0, atol=1e-5 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prefix_tokens_weigh_what_they_cost():
    def weights(name: str) -> dict:
        model = MODELS[name]().eval()
        return {layer: cost.prefix_weight for layer,
                cost in fisher(model, given_of(model, (16,)), progress=False).items()}
    of_class_token, of_patches = weights("class token"), weights("mean of patches")
    assert of_class_token[2, "neurons"] == HEAVIEST                             # the classifier reads no patch
    assert all(1 < weight <= HEAVIEST for weight in of_class_token.values())
    assert of_patches[1, "neurons"] == 1 and set(weights("no prefix token").values()) == {1.0}
    assert Fisher(metric=torch.eye(2), prefix_weight=1.0).root().shape == (2, 2)


def test_half_of_the_squared_error_by_the_cost_is_the_divergence_of_a_small_error():
    """To second order, in the mean over many draws: KL(p || p') = e^T F e / 2 of an error e of the last fc2, where the
    class token alone is read."""
    model, x = tiny(num_classes=2).eval(), images(1)
    cost = fisher(model, [(x.expand(1024, -1, -1, -1), None)], images=1024,
                  progress=False)[1, "neurons"].metric.double() / 1024
    error = 0.02 * torch.randn(24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x).double().log_softmax(dim=1)
        model.blocks[1].mlp.fc2.bias += error
        after = model(x).double().log_softmax(dim=1)
    wanted, found = float((before.exp() * (before - after)).sum()), float(error.double() @ cost @ error.double() / 2)
    # of 1,024 draws, and the third order of the error
    assert found == pytest.approx(wanted, rel=0.25)


def test_gradients_are_of_the_first_images_a_few_at_a_time_and_the_draws_follow_the_seed(monkeypatch):
    model, (given, _) = tiny().eval(), watch_draws(monkeypatch)
    costs = [fisher(model, given_of(model, (40, 30)), images=48, seed=seed, progress=False)[0, "heads"].metric
             for seed in (0, 0, 1)]
    # a whole part is taken where it is begun
    assert [len(rows) for rows in given] == [AT_ONCE, AT_ONCE, 8, AT_ONCE] * 3
    assert torch.equal(costs[0], costs[1]) and not torch.equal(costs[0], costs[2])
    assert fisher(model, [], progress=False) == {}


def test_processes_draw_each_for_itself(monkeypatch):
    costs = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        costs.append(fisher(tiny().eval(), given_of(None), progress=False)[0, "heads"].metric)
    assert not torch.equal(*costs)


def test_moments_are_of_all_tokens_of_all_images(model):
    batches, layers = given_of(model), layers_of(model)
    seen: dict = {layer: [] for layer in layers}
    plain = dict(each_moments(model, batches))
    assert list(plain) == layers and list(dict(each_moments(model, batches, ["heads"]))) == layers[::2]
    for layer in layers:
        linear = mixing_layer(attention_block(model.blocks[layer[0]]), layer[1])[0]
        linear.register_forward_pre_hook(lambda m, given, layer=layer: seen[layer].append(given[0].detach().double()))
    for x, _ in batches:
        model(x)
    for layer in layers:
        a, found = torch.cat(seen[layer]).flatten(0, 1), plain[layer]           # (rows, K)
        assert float(found.rows) == len(a)
        for own, wanted in ((found.sum, a.sum(dim=0)), (found.products, a.T @ a)):
            # float32 products
            assert torch.allclose(own, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["class token", "segmenter"])
def test_units_are_eliminated_by_what_their_absence_costs(name):
    model = MODELS[name]().eval()
    batches = given_of(model, (8, 8, 5))
    found, plain = (unit_scores(model, batches, criterion=criterion, progress=False)
                    for criterion in ("fisher", "reconstruction"))
    costs = fisher(model, batches, progress=False)
    moments = dict(each_moments(model, batches))
    for index, kind in layers_of(model):
        linear, width = mixing_layer(model.blocks[index], kind)
        # R W: |R W a|^2 is what W a costs
        turned = costs[index, kind].root() @ linear.weight.detach().double()
        order = elimination_order(turned, moments[index, kind], width)
        assert torch.equal(getattr(found, kind)[index].argsort(), order.cpu())
    assert not torch.equal(found.neurons,
                           plain.neurons) and found.made_by["criterion"] == "fisher" and found.made_by["images"] == "21"
