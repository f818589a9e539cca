"""Losses between features against closed forms and hand-computed values (methods.md, section 2)."""

import pytest
import torch
from torch.nn import functional

from distill.errors import DistillError
from distill.losses import attention_transfer, cosine, hint, patient
from tests.distill.losses.pairs import gradient, pair, real_tokens


class TestVectors:
    def test_cosine_is_zero_orthogonal_one_opposite_two(self):
        student = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        teacher = torch.tensor([[9.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
        values = [cosine(s, t).item() for s, t in zip(student.split(1), teacher.split(1), strict=True)]
        assert values == pytest.approx([0, 1, 2], abs=1e-6)
        assert cosine(student, teacher, mask=torch.tensor([1, 1, 0])).item() == pytest.approx(0.5)

    def test_cosine_equals_torch_cosine_embedding_loss(self):
        student, teacher = pair(5, 8)
        torch.testing.assert_close(
            cosine(student, teacher), functional.cosine_embedding_loss(student, teacher, torch.ones(5))
        )

    @pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
    def test_patient_is_two_minus_two_cosines_over_the_width(self, shape):
        student, teacher = pair(*shape)
        torch.testing.assert_close(patient(student, teacher), 2 * cosine(student, teacher) / 8)
        torch.testing.assert_close(patient(3 * student, 0.1 * teacher), patient(student, teacher))

    def test_patient_keeps_small_differences_of_half_precision(self):
        """Squares of float16 differences of unit vectors underflow; in float32 they do not."""
        teacher = functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
        student = teacher.half().clone()
        student[:, ::2] += 2.0**-13
        assert patient(student, teacher.half()).item() == pytest.approx(2.0**-27, rel=0.2)


class TestHint:
    def test_is_the_mean_over_all_entries(self):
        student, teacher = pair(2, 3, 4, 5)
        torch.testing.assert_close(hint(student, teacher), (student - teacher).square().sum() / 120)

    def test_masked_equals_a_loop(self):
        student, teacher = pair(3, 5, 7)
        values = [(student[b, t] - teacher[b, t]).square().mean() for b, t in real_tokens().nonzero().tolist()]
        torch.testing.assert_close(hint(student, teacher, real_tokens()), torch.stack(values).mean())

    def test_refuses_other_shapes(self):
        with pytest.raises(DistillError, match=r"student \(2, 4\), teacher \(2, 6\); put a regressor .*Linear"):
            hint(torch.zeros(2, 4), torch.zeros(2, 6))
        with pytest.raises(DistillError, match=r"\(2, 4, 3, 3\), teacher \(2, 6, 3, 3\); put .*Conv2d"):
            hint(torch.zeros(2, 4, 3, 3), torch.zeros(2, 6, 3, 3))
        with pytest.raises(DistillError, match=r"mask is \(2, 5\): .*; pass one of shape \(2, 4\)"):
            hint(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), torch.ones(2, 5))


class TestAttentionTransfer:
    def test_value_by_hand(self):
        """Q is (9, 16) / √337 and (1, 0)."""
        student = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).reshape(1, 2, 1, 2)
        teacher = torch.tensor([[1.0, 0.0]]).reshape(1, 1, 1, 2)
        expected = ((9 / 337**0.5 - 1) ** 2 + 256 / 337) / 2
        assert attention_transfer(student, teacher).item() == pytest.approx(expected)

    def test_equals_a_loop_over_examples(self):
        student, teacher = pair(3, 4, 2, 5)
        values = []
        for s, t in zip(student, teacher[:, :3], strict=True):
            q_s, q_t = ((m**2).sum(0).flatten() for m in (s, t))
            values.append((q_s / q_s.norm() - q_t / q_t.norm()).square().sum() / 10)
        torch.testing.assert_close(attention_transfer(student, teacher[:, :3]), torch.stack(values).mean())

    def test_knows_neither_scale_nor_sign_nor_order_of_channels(self):
        student, teacher = pair(3, 4, 2, 5)
        torch.testing.assert_close(
            attention_transfer(-7 * student.flip(1), teacher), attention_transfer(student, teacher)
        )
        assert attention_transfer(student, -7 * student.detach().flip(1)).item() == pytest.approx(0, abs=1e-15)

    @pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((4, 3), (2, 6))])
    def test_the_larger_is_averaged_down(self, sizes):
        (h, w), (th, tw) = sizes
        student, teacher = pair(2, 3, h, w)[0], pair(2, 5, th, tw)[1]
        small = [
            maps.reshape(2, maps.shape[1], 2, maps.shape[2] // 2, 3, maps.shape[3] // 3).mean((3, 5))
            for maps in (student, teacher)
        ]
        torch.testing.assert_close(attention_transfer(student, teacher), attention_transfer(*small))

    @pytest.mark.parametrize("content", [0.0, 1e4, float("nan")])
    def test_padding_changes_nothing(self, content):
        """Two sentences of 4 and 2 tokens with attention patterns of 3 and 2 heads, padded by 3."""
        generator = torch.Generator().manual_seed(0)
        patterns = [torch.randn(2, heads, 4, 4, generator=generator).softmax(-1) for heads in (3, 2)]
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        square = mask[:, :, None] * mask[:, None]
        student, teacher = (functional.pad(p, (0, 3, 0, 3), value=content).requires_grad_() for p in patterns)
        value = attention_transfer(student, teacher, functional.pad(square, (0, 3, 0, 3)))
        short, long = (attention_transfer(*(p[i : i + 1, :, :n, :n] for p in patterns)) for i, n in ((1, 2), (0, 4)))
        torch.testing.assert_close(value, (short + long) / 2)
        assert gradient(value, student).isfinite().all()

    def test_a_mask_that_keeps_all_is_none(self):
        student, teacher = pair(3, 4, 2, 5)
        torch.testing.assert_close(
            attention_transfer(student, teacher, torch.ones(3, 2, 5)), attention_transfer(student, teacher)
        )

    def test_an_example_without_positions_is_left_out(self):
        student, teacher = pair(3, 4, 2, 5)
        mask = torch.ones(3, 2, 5)
        mask[1] = 0
        expected = attention_transfer(student[::2], teacher[::2])
        torch.testing.assert_close(attention_transfer(student, teacher, mask), expected)
        with pytest.raises(DistillError, match=r"No position is left .* 0 of 30 are kept .*skip this batch"):
            attention_transfer(student, teacher, 0 * mask)

    def test_a_map_of_zeros_has_a_gradient(self):
        student = torch.zeros(1, 2, 2, 2, requires_grad=True)
        assert gradient(attention_transfer(student, torch.ones(1, 2, 2, 2)), student).isfinite().all()

    @pytest.mark.parametrize(
        ("student", "teacher", "mask", "message"),
        [
            ((2, 4), (2, 4), None, r"maps \[batch, channels, height, width\]: student_map \(2, 4\)"),
            ((2, 4, 3, 3), (1, 4, 3, 3), None, r"batches differ: student_map \(2, 4, 3, 3\)"),
            ((2, 4, 3, 3), (2, 4, 6, 6), (2, 3, 3), r"one mask for both maps, but their sizes differ"),
            ((2, 4, 3, 3), (2, 4, 3, 3), (2, 4, 3, 3), r"pass one of shape \(2, 3, 3\), without channels"),
            ((0, 4, 3, 3), (0, 4, 3, 3), None, r"No example is left"),
        ],
    )
    def test_refuses_other_shapes(self, student, teacher, mask, message):
        with pytest.raises(DistillError, match=message):
            attention_transfer(torch.zeros(student), torch.zeros(teacher), None if mask is None else torch.ones(mask))


def test_the_mask_of_cosine_may_be_positional():
    student, teacher = pair(3, 5, 7)
    assert torch.equal(cosine(student, teacher, real_tokens()), cosine(student, teacher, mask=real_tokens()))
