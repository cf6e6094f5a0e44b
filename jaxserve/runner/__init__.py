"""Everything that touches the device: shapes, packing, the compiled step, memory."""
