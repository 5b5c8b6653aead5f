"""What a training needs of a device's memory: counted on models without storage, before anything is loaded.

``states`` has what stands between two steps, ``activations`` what a micro-batch adds, ``plan`` both together at each moment of a
step, ``advice`` what to change. ``counting`` counts the bytes of tensors that operations really make.
"""
