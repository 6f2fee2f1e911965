"""What tokens' paths ask of a node."""

from schemas.paths import layers_run, path_memory, path_nodes
from schemas.topology import Context
from tests.planning import model_spec
from tests.small_plans import path

MODEL = model_spec(
    layers=4, trunk_layer_bytes=10, embedding_bytes=7, input_bytes=3, head_bytes=5, kv_bytes_per_token_layer=2
)
CONTEXT = Context(tokens=10, sessions=3)  # 60 bytes of KV cache in each layer


def test_weights_are_there_once_and_the_cache_once_for_each_ingress():
    paths = [path("a", "a", "a", "b", "b"), path("c", "b", "a", "a", "b")]
    assert layers_run("a", paths) == {0, 1, 2}
    assert path_memory("a", paths, MODEL, CONTEXT) == (30 + 3, 4 * 60)
    assert path_memory("b", paths, MODEL, CONTEXT) == (30 + 7, 4 * 60)
    assert path_memory("c", paths, MODEL, CONTEXT).total == 0
    assert path_nodes(paths) == {"a", "b", "c"}


def test_while_a_path_changes_what_both_have_counts_once():
    before, after = path("a", "a", "a", "a", "a"), path("a", "b", "b", "a", "a")
    assert path_memory("a", [before, after], MODEL, CONTEXT) == path_memory("a", [before], MODEL, CONTEXT)
    assert path_memory("b", [before, after], MODEL, CONTEXT) == (20 + 3, 2 * 60)
