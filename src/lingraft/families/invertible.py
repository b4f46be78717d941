"""An invertible coupling (MAD-X) is a bijection after the embeddings; its tensors are merged by difference.

`y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`, with F and G two linear layers each. A site holds `F.down`, `F.down_bias`, `F.up`,
`F.up_bias`, and the same of G. Any weights give a bijection, so sums of weights stay in the structure.
"""

from lingraft.families.elementwise import Additive

DIFFERENCE = Additive("invertible/difference")
"""`T + λ(R_t − R_s)`."""
