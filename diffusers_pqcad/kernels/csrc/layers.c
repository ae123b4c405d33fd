/* Products of 8-bit codes and int8 levels with exact sums, on x86 CPUs. Compiled on first use, by native.py, for the CPU
   that it runs on, as one unit: the headers hold the code, one idea each.

   With VNNI, of AVX-512 or AVX (laptops' CPUs), one instruction, vpdpbusd, multiplies bytes and adds four products in 32
   bits. With AVX2 alone, vpmaddubsw multiplies bytes and adds neighbours in 16 bits, vpmaddwd widens such sums to 32 bits.
   Then there are two ways to stay inside 16 bits (x86.py chooses):
   - narrow levels: many steps are added in 16 bits before they are widened, in windows that cannot overflow. The time of
     vpmaddwd is saved: half of what the multiplier does.
   - levels of 8 bits: the codes are shifted to -128..127. Of two products of magnitudes up to 128 and 127, the sum fits;
     each is widened.

   What takes long is dealt out as threads ask for it, for cores may be busy, or of several kinds. */
#include "filters.h"  /* what is done once to a layer's weights */
#include "residual.h" /* what is done in each call, of one layer, some or a block */

/* For x86.py: what this code was compiled for. */
int has_vnni(void) { return VNNI; }
int block_outputs(void) { return OUTPUTS; }
