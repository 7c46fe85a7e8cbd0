"""Laid-out histories against plain lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.code_sequences import BEGIN, TEXT, Template, lay_out

SIZES = (5, 4, 3)
LENGTHS = [3, 1, 0, 4]
CODES = np.random.default_rng(0).integers(0, SIZES, (4, 4, 3)).astype(np.int32)
TEMPLATES = [None, Template((1, 7)), Template((1,), (9, 8, 30))]

laid_out = jax.jit(lay_out, static_argnums=2, static_argnames="with_target")


def plain(codes: np.ndarray, length: int, template: Template | None, with_target: bool) -> tuple[list, int]:
    """[(token, level, item)] of one row, and its state's position."""
    prefix = [(0, BEGIN, -1)] if template is None else [(token, TEXT, -1) for token in template.prefix]
    suffix = [] if template is None else [(token, TEXT, -1) for token in template.suffix]
    items = [[(int(codes[i, level]), level, i) for level in range(3)] for i in range(length)]
    target = items.pop() if with_target and items else []
    context = prefix + [code for item in items for code in item] + suffix
    return context + target, len(context) - 1


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_layout_equals_lists(template: Template | None, with_target: bool) -> None:
    sequence = laid_out(CODES, jnp.array(LENGTHS), template, with_target=with_target)
    widest = max(len(plain(CODES[row], 4, template, with_target)[0]) for row in range(4))
    assert sequence.codes.shape == (4, widest) and (sequence.text is None) == (template is None)
    for row, length in enumerate(LENGTHS):
        expected, state = plain(CODES[row], length, template, with_target)
        expected += [(0, BEGIN, -1)] * (widest - len(expected))
        for field, values in (("levels", [x[1] for x in expected]), ("items", [x[2] for x in expected])):
            assert getattr(sequence, field)[row].tolist() == values, field
        assert sequence.codes[row].tolist() == [token if level >= 0 else 0 for token, level, _ in expected]
        if template is not None:
            assert sequence.text[row].tolist() == [token if level == TEXT else 0 for token, level, _ in expected]
        assert sequence.lengths[row] == len(plain(CODES[row], length, template, with_target)[0])
        assert sequence.state[row] == state


def test_a_row_without_its_target_is_the_row_before_it() -> None:
    template = TEMPLATES[2]
    whole = laid_out(CODES[:, :3], jnp.array([3, 2, 2, 1]), template, with_target=True)
    asked = laid_out(CODES[:, :3], jnp.array([2, 1, 1, 0]), template, with_target=False)
    np.testing.assert_array_equal(whole.state, asked.state)
    np.testing.assert_array_equal(asked.lengths, asked.state + 1)
    seen = np.arange(whole.codes.shape[1]) <= np.asarray(whole.state)[:, None]
    for field in ("codes", "levels", "items", "text"):
        np.testing.assert_array_equal(np.asarray(getattr(whole, field))[seen], np.asarray(getattr(asked, field))[seen])


def test_a_template_needs_a_prefix() -> None:
    with pytest.raises(ValueError, match=r"prefix is empty.*give a BOS"):
        Template((), (1,))
