"""The order of the data: the position formula, process counts, masks, repeats, epochs, resuming."""

from collections import Counter
from fractions import Fraction

import pytest

from proteus.data.sampler import Draw, Sampler

G = 12  # images of a global micro-batch in most tests: 1, 2, 3 and 4 processes divide it


def make(processes: int = 1, **settings) -> Sampler:
    settings = {"size": 100, "accumulate": 1, "repeats": 3, "mask_probability": 0.5, "seed": 7, **settings}
    return Sampler(batch_size=G // processes, processes=processes, **settings)


def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch, read off a run whose only batch of an epoch is the whole set."""
    return [draw.image for draw in Sampler(size=size, batch_size=size, seed=seed).micro_batch(epoch, 0, 0)]


def whole_epoch(sampler: Sampler, epoch: int = 0) -> list[Draw]:
    """All draws of an epoch over all processes."""
    steps = sampler.steps_per_epoch
    return [
        draw
        for rank in range(sampler.processes)
        for batch in sampler.run(epoch * steps, (epoch + 1) * steps, rank)
        for draw in batch
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize(("repeats", "probability"), [(1, 0.5), (3, 0.5), (3, 0.3), (2, 1.0), (4, 0.0)])
def test_every_draw_follows_the_formula(processes, accumulate, repeats, probability):
    sampler = make(processes, accumulate=accumulate, repeats=repeats, mask_probability=probability)
    length = 100 // (accumulate * G)
    masked = int(Fraction(str(probability)) * G)  # 6, 3, 12 or 0 of 12
    orders = [permutation(100, 7, epoch) for epoch in range(3)]
    for step in range(2 * length + 2):
        epoch, s = divmod(step, length)
        for a in range(accumulate):
            for rank in range(processes):
                expected = []
                for i in range(rank, G, processes):
                    p = (s * accumulate + a) * G + i
                    expected.append((orders[epoch][p // repeats], epoch, p, i < masked))
                assert sampler.micro_batch(step, a, rank) == expected


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_batch_of_one(processes, accumulate):
    one = list(make(1, accumulate=accumulate).run(0, 11, 0))
    many = [list(make(processes, accumulate=accumulate).run(0, 11, rank)) for rank in range(processes)]
    for number, batch in enumerate(one):
        for rank in range(processes):
            assert many[rank][number] == batch[rank::processes]
        together = [draw for rank in range(processes) for draw in many[rank][number]]
        assert sorted(together) == sorted(batch)
        assert len(set(together)) == G


@pytest.mark.parametrize(("processes", "batch"), [(1, 12), (2, 6), (3, 4), (4, 3), (3, 5), (4, 1), (7, 3)])
@pytest.mark.parametrize("probability", ["0", "0.05", "0.25", "0.3", "0.5", "0.9", "1"])
def test_masked_images_come_first_and_are_counted(processes, batch, probability):
    sampler = Sampler(size=500, batch_size=batch, processes=processes, mask_probability=float(probability))
    total = Fraction(probability) * processes * batch
    counts = []
    for rank in range(processes):
        flags = [draw.masked for draw in sampler.micro_batch(1, 0, rank)]
        counts.append(sum(flags))
        assert flags == [True] * counts[-1] + [False] * (batch - counts[-1])
    assert sum(counts) == sampler.masked == total.numerator // total.denominator
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [100, 144, 143])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_images_of_an_epoch_appear_repeats_times(repeats, processes, size):
    sampler = make(processes, size=size, repeats=repeats)
    positions = size // G * G
    for epoch in (0, 3):
        seen = Counter(draw.image for draw in whole_epoch(sampler, epoch))
        order = permutation(size, 7, epoch)
        whole, rest = divmod(positions, repeats)
        expected = dict.fromkeys(order[:whole], repeats)
        if rest:  # the epoch ends within an image's repeats
            expected[order[whole]] = rest
        assert seen == expected


def test_repeats_of_an_image_stand_together_in_a_batch():
    images = [draw.image for draw in make(repeats=3).micro_batch(2, 0, 0)]
    assert images == [image for image in images[::3] for _ in range(3)]
    assert len(set(images)) == 4


def test_every_key_of_an_epoch_occurs_once():
    draws = whole_epoch(make(2, accumulate=2, size=200), 1)
    assert sorted(draw.position for draw in draws) == list(range(8 * 2 * G))
    assert {draw.epoch for draw in draws} == {1}


@pytest.mark.parametrize(
    ("size", "accumulate", "steps"), [(100, 1, 8), (100, 2, 4), (96, 1, 8), (95, 1, 7), (47, 2, 1), (12, 1, 1)]
)
def test_epoch_length_does_not_depend_on_processes(size, accumulate, steps):
    for processes in (1, 2, 3, 4):
        sampler = make(processes, size=size, accumulate=accumulate)
        assert sampler.global_batch == G
        assert sampler.steps_per_epoch == steps
        assert {draw.epoch for draw in sampler.micro_batch(steps - 1, 0, 0)} == {0}
        after = sampler.micro_batch(steps, 0, 0)
        assert {draw.epoch for draw in after} == {1}
        assert after[0].position == 0


@pytest.mark.parametrize(("size", "accumulate", "repeats"), [(5, 1, 1), (5, 2, 1), (1, 1, 1), (5, 1, 2), (2, 1, 3)])
def test_a_set_smaller_than_a_batch_wraps(size, accumulate, repeats):
    for processes in (1, 4):
        sampler = make(processes, size=size, accumulate=accumulate, repeats=repeats)
        assert sampler.steps_per_epoch == 1
        draws = sorted(whole_epoch(sampler, 2), key=lambda draw: draw.position)
        assert [draw.position for draw in draws] == list(range(accumulate * G))
        order = permutation(size, 7, 2)
        around = [image for image in order * (accumulate * G) for _ in range(repeats)]
        assert [draw.image for draw in draws] == around[: accumulate * G]
        assert {draw.image for draw in draws} == set(range(size))


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 2), (3, 1)])
def test_a_run_resumes_at_any_step(processes, accumulate):
    rank = processes - 1
    stop = 2 * (100 // (accumulate * G)) + 3
    whole = list(make(processes, accumulate=accumulate).run(0, stop, rank))
    assert len(whole) == stop * accumulate
    for start in range(stop + 1):
        fresh = make(processes, accumulate=accumulate)
        assert list(fresh.run(start, stop, rank)) == whole[start * accumulate :]


def test_steps_may_be_asked_for_in_any_order():
    sampler = make(2, accumulate=2)
    forward = {(step, a): sampler.micro_batch(step, a, 1) for step in range(20) for a in range(2)}
    for step, a in sorted(forward, key=lambda key: (key[0] * 7 % 20, -key[1])):
        assert sampler.micro_batch(step, a, 1) == forward[step, a]


def test_epochs_and_seeds_have_permutations_of_their_own():
    orders = {}
    for seed in (0, 1, 2, 2**40, 2**63 - 1):
        for epoch in range(4):
            order = permutation(60, seed, epoch)
            assert sorted(order) == list(range(60))
            orders[tuple(order)] = (seed, epoch)
    assert len(orders) == 20
    # Unrelated: two random permutations of 60 agree in one place on average, and in 10 with probability below 1e-7.
    some = list(orders)
    agreements = [sum(a == b for a, b in zip(x, y, strict=True)) for i, x in enumerate(some) for y in some[:i]]
    assert max(agreements) < 10
    assert 0.7 < sum(agreements) / len(agreements) < 1.3


def test_places_of_an_image_are_uniform_over_epochs():
    places = Counter(permutation(10, 3, epoch).index(4) for epoch in range(2000))
    chi2 = sum((places[place] - 200) ** 2 / 200 for place in range(10))
    assert chi2 < 33.7  # the 0.9999 quantile of chi-square with 9 degrees of freedom
