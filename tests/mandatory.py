"""The settings without which there is no run, as variables."""

MANDATORY = {
    "HL_TAG": "first",
    "HL_BASE_OUT_PATH": "/runs",
    "HL_ACTOR_MODEL_PATH": "/models/actor",
    "HL_CRITIC_MODEL_PATH": "/models/critic",
    "HL_DATASET_PATH": "/data/prompts",
}
