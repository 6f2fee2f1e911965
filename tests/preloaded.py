"""What agents and commands import, imported once by the process that `tests.forked` forks them from."""
# ruff: noqa: F401

import highspy
import ortools.sat.python.cp_model
import pulp
import transformers.models.auto.tokenization_auto
import transformers.models.qwen3_moe.modeling_qwen3_moe
import transformers.tokenization_utils_tokenizers

import agent.cli
import agent.node
import planner.cli
import planner.control.cli
import planner.solvers.choose
import planner.solvers.cpsat.solver
import planner.solvers.decomposition.solver
import planner.solvers.latency.solver
import planner.solvers.milp.joint
import planner.solvers.milp.solver
