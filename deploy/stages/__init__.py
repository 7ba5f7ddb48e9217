"""The stages of the main job: each takes artifacts and returns one."""
