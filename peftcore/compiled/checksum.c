/* A checksum of the weights of an adapter. `checksum.py` says why it is here.

   The words of each part are divided among lanes. A step of a lane can be undone, so one changed word always changes
   the sum, and several changed words leave it as it is with a probability of 2^-32. */

#include "vectors.h"

#define LANES 4 /* vectors of lanes, so that a step need not wait for the one before */
#define STRIDE (LANES * WIDTH * 4)

INLINE uint64_t mixed(uint64_t sum, uint64_t word)
{
    sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
    return sum ^ (sum >> 32);
}

INLINE uint64_t with_part(uint64_t sum, const uint8_t *part, long bytes)
{
    words lanes[LANES] = {{0}};
    long i = 0;
    for (; i + STRIDE <= bytes; i += STRIDE)
        for (int lane = 0; lane < LANES; lane++) {
            words word;
            memcpy(&word, part + i + lane * WIDTH * 4, sizeof word);
            lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b1u;
        }
    for (; i < bytes; i++)
        sum = mixed(sum, part[i]);
    for (int lane = 0; lane < LANES; lane++)
        for (int k = 0; k < WIDTH; k++)
            sum = mixed(sum, lanes[lane][k]);
    return sum;
}

uint64_t checksum(const uint8_t *first, long first_bytes, const uint8_t *second, long second_bytes,
                  const uint8_t *third, long third_bytes)
{
    uint64_t sum = with_part(0, first, first_bytes);
    sum = with_part(sum, second, second_bytes);
    return with_part(sum, third, third_bytes);
}
