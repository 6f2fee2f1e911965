"""Decoding on a CUDA device with few launches: slots looked up on the device, whole steps captured as graphs.

Nothing here is imported on a machine without such a device, but for what decides purely. Flow: `decode` (a step of a
model that is made of `parts`) → `layers` (its operations, from `kernels` or `reference`) → `runners` (captured) ·
`fetched` (the device brings what a layer lacks by itself, `supply`) or `waited` (the host does, `bringing`) → `copies`
(host to slot, on a stream of their own). Prompts: `prompts`, `lacking`; `grouped` where layers are transformers'.
"""
