"""The features of a sparse autoencoder, or of any encoder and its decoder, as a subspace.

Coordinates are encode(x), and replacing them by z gives x + decode(z) − decode(encode(x)): what the autoencoder does
not reconstruct stays (Cunningham et al. 2023, arXiv:2309.08600).
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from interventions.arguments import checked
from interventions.devices import indices_on
from interventions.errors import InterventionError
from interventions.names import shown
from interventions.subspaces.subspace import Subspace, difference


@checked
class SparseCoder(Subspace):
    """The features of an encoder and its decoder, e.g. a sparse autoencoder (Cunningham et al. 2023, arXiv:2309.08600).

    What the decoder does not reconstruct stays: `replace(x, z)` is `x + decode(z) − decode(encode(x))`.

    Alignment does not train it (`learned()` is empty), as a dictionary trained to please an alignment would be another
    dictionary. To learn which features to replace, write `Mask(within=SparseCoder(encode, decode))`.

    Args:
        encode: `[..., width] → [..., features]`. A module, or the module whose method it is
            (`SparseCoder(sae.encode, sae.decode)`), is moved and saved with this one, and called in its own dtype;
            other functions are called in fp32.
        decode: `[..., features] → [..., width]`.
        features: which features are the coordinates; None is all of them.

    Raises:
        InterventionError: features that are not distinct numbers from 0 on; when called, a result of another shape.

    >>> import torch
    >>> coder = SparseCoder(torch.relu, lambda z: z, features=[0])
    >>> coder.replace(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([5.0])).tolist()
    [5.0, 2.0, -3.0]
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        features: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if features is not None and (not features or min(features) < 0 or len(set(features)) < len(features)):
            raise InterventionError(
                f"SparseCoder(features={list(features)}) does not name features once each, counted from 0; write "
                "features=[3, 17], or leave it out for all."
            )
        self.encode, self.decode = encode, decode
        self.features = None if features is None else tuple(features)
        owners = (getattr(function, "__self__", None) for function in (encode, decode))
        self.owners = nn.ModuleList(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))

    def learned(self) -> list[nn.Parameter]:
        """Return no parameters: the dictionary is given."""
        return []

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this module again."""
        return {"features": None if self.features is None else list(self.features)}

    def _coordinates(self, x: Tensor) -> Tensor:
        return self._selected(self._encoded(x)).to(x.dtype)

    def _replaced(self, x: Tensor, coordinates: Tensor) -> Tensor:
        old = self._encoded(x)
        difference(coordinates, self._selected(old))
        new = coordinates.to(old.dtype)
        if self.features is not None:
            new = old.index_copy(-1, indices_on(old.device, self.features), new)
        change = self._answer("decode", new) - self._answer("decode", old)
        if change.shape != x.shape:
            raise InterventionError(
                f"decode of SparseCoder returned shape {list(change.shape)} for an activation of shape "
                f"{list(x.shape)}; return one vector of width {x.shape[-1]} for each."
            )
        return x + change.to(x.dtype)

    def _encoded(self, x: Tensor) -> Tensor:
        own = next((p.dtype for p in chain(self.parameters(), self.buffers()) if p.is_floating_point()), x.dtype)
        return self._answer("encode", x.to(own))

    def _answer(self, name: str, given: Tensor) -> Tensor:
        answer = getattr(self, name)(given)
        if not isinstance(answer, Tensor):
            raise InterventionError(
                f"{name} of SparseCoder returned {shown(answer)}, which is no tensor; return one vector for each."
            )
        return answer

    def _selected(self, encoded: Tensor) -> Tensor:
        if self.features is None:
            return encoded
        if max(self.features) >= encoded.shape[-1]:
            raise InterventionError(
                f"SparseCoder(features=…) names feature {max(self.features)} and encode returns "
                f"{encoded.shape[-1]}; write features=range(0, {encoded.shape[-1]})."
            )
        return encoded.index_select(-1, indices_on(encoded.device, self.features))
