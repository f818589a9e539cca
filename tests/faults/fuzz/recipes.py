"""Right calls of everything that is public."""

from tests.faults.fuzz.interventions_recipes import RECIPES as OF_INTERVENTIONS

RECIPES = [*OF_INTERVENTIONS]
