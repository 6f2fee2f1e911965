"""The placement problem as a mixed-integer linear model in PuLP, solved by HiGHS or CBC.

Flow: `variables` → `constraints` → `model` → `backends` → `solver`. `cpsat` mirrors it file by file.
"""
