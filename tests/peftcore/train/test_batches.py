import torch

from peftcore.train import LengthGroupedSampler, RightPaddingCollator


def lengths(count: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batches(sampler: LengthGroupedSampler) -> list[list[int]]:
    order = list(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


def test_every_row_comes_once_an_epoch() -> None:
    sampler = LengthGroupedSampler(lengths(203), batch_size=8, seed=3)
    assert sorted(sampler) == list(range(203)) and len(sampler) == 203


def test_batches_hold_rows_of_like_length() -> None:
    known = lengths(1600)
    longest = [max(known[i] for i in batch) for batch in batches(LengthGroupedSampler(known, batch_size=8))]
    assert 8 * sum(longest) < 1.1 * sum(known)


def test_how_late_a_batch_comes_says_nothing_of_its_length() -> None:
    known = lengths(1600)
    sampler = LengthGroupedSampler(known, batch_size=8)
    differences = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        means = [sum(known[i] for i in batch) / len(batch) for batch in batches(sampler)]
        half = len(means) // 2
        differences.append(sum(means[:half]) / half - sum(means[half:]) / (len(means) - half))
    assert abs(sum(differences) / len(differences)) < 10  # sorted pools would give over 100 either way


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    sampler = LengthGroupedSampler(lengths(100), batch_size=4, seed=1)
    first = list(sampler)
    torch.rand(17)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths(100), batch_size=4, seed=2)) != first


def test_an_empty_set_has_no_batches() -> None:
    assert list(LengthGroupedSampler([], batch_size=4)) == []


def test_rows_are_padded_on_the_right_and_padding_is_neither_seen_nor_supervised() -> None:
    collate = RightPaddingCollator(pad_token_id=9, multiple=4)
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5]}, {"input_ids": [6], "labels": [6]}]
    made = collate(rows)
    assert made["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 9, 9, 9, 9, 9, 9, 9]]
    assert made["labels"].tolist() == [[-100, 2, 3, 4, 5, -100, -100, -100], [6] + [-100] * 7]
    assert made["attention_mask"].sum(1).tolist() == [5, 1]
