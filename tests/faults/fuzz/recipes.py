"""Right calls of everything that is public."""

from tests.faults.fuzz.attribution_recipes import RECIPES as OF_ATTRIBUTION
from tests.faults.fuzz.causal_recipes import RECIPES as OF_CAUSAL_MODELS
from tests.faults.fuzz.editing_recipes import RECIPES as OF_EDITING
from tests.faults.fuzz.interventions_recipes import RECIPES as OF_INTERVENTIONS
from tests.faults.fuzz.lens_recipes import RECIPES as OF_LENSES
from tests.faults.fuzz.losses_recipes import RECIPES as OF_LOSSES
from tests.faults.fuzz.measuring_recipes import RECIPES as OF_MEASURING
from tests.faults.fuzz.objective_recipes import RECIPES as OF_OBJECTIVES
from tests.faults.fuzz.tasks_recipes import RECIPES as OF_TASKS
from tests.faults.fuzz.teacher_recipes import RECIPES as OF_TEACHERS
from tests.faults.fuzz.training_recipes import RECIPES as OF_TRAINING

RECIPES = [
    *OF_INTERVENTIONS, *OF_TRAINING, *OF_OBJECTIVES, *OF_CAUSAL_MODELS, *OF_TEACHERS, *OF_LOSSES, *OF_TASKS,
    *OF_MEASURING, *OF_ATTRIBUTION, *OF_LENSES, *OF_EDITING,
]  # fmt: skip
