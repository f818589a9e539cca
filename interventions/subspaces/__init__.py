"""Subspaces: fixed or learnable modules that read the coordinates of an activation and write new ones.

An operator at a location with a subspace acts on the coordinates, and what the subspace does not span stays as it is:
`subspace.replace(base, op(subspace.coordinates(base), subspace.coordinates(source), generator))`.
"""

from interventions.subspaces.masks import Mask
from interventions.subspaces.pca import PCA
from interventions.subspaces.rotations import BoundlessRotation, Rotation
from interventions.subspaces.sparse import SparseCoder
from interventions.subspaces.subspace import Subspace

__all__ = ["PCA", "BoundlessRotation", "Mask", "Rotation", "SparseCoder", "Subspace"]
