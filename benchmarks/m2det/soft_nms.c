/* Linear soft-NMS of one class, one box after the other: the reference's compiled loop, anew.

   rows: n times x1, y1, x2, y2, score. The best box of the rest comes next, every other loses by
   its IoU with it, and one that falls below the least score is replaced by the last, which is
   looked at instead. Returns how many are left. */
int soft_nms(float *rows, int n, float most, float least)
{
    for (int taken = 0; taken < n; taken++) {
        int best = taken;
        for (int k = taken + 1; k < n; k++)
            if (rows[5 * k + 4] > rows[5 * best + 4])
                best = k;
        for (int side = 0; side < 5; side++) {
            float value = rows[5 * taken + side];
            rows[5 * taken + side] = rows[5 * best + side];
            rows[5 * best + side] = value;
        }
        const float *own = rows + 5 * taken;
        float area = (own[2] - own[0] + 1) * (own[3] - own[1] + 1);
        for (int k = taken + 1; k < n;) {
            float *other = rows + 5 * k;
            float right = own[2] < other[2] ? own[2] : other[2];
            float left = own[0] > other[0] ? own[0] : other[0];
            float lower = own[3] < other[3] ? own[3] : other[3];
            float upper = own[1] > other[1] ? own[1] : other[1];
            float wide = right - left + 1, high = lower - upper + 1;
            if (wide > 0 && high > 0) {
                float all = (other[2] - other[0] + 1) * (other[3] - other[1] + 1);
                float iou = wide * high / (area + all - wide * high);
                if (iou > most)
                    other[4] *= 1 - iou;
                if (other[4] < least) {
                    n--;
                    for (int side = 0; side < 5; side++)
                        other[side] = rows[5 * n + side];
                    continue;
                }
            }
            k++;
        }
    }
    return n;
}
