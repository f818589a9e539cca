"""Which directions of an activation: learnable modules that read coordinates and write them back.

An operator at a location with a subspace acts on the coordinates; whatever the subspace does not span stays:
`subspace.replace(base, op(subspace.coordinates(base), subspace.coordinates(source), generator))`.
"""

from interventions.subspaces.masks import Mask
from interventions.subspaces.pca import PCA
from interventions.subspaces.rotations import BoundlessRotation, Rotation
from interventions.subspaces.sparse import SparseCoder
from interventions.subspaces.subspace import Subspace

__all__ = ["PCA", "BoundlessRotation", "Mask", "Rotation", "SparseCoder", "Subspace"]
