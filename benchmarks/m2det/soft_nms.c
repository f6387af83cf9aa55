/* Linear soft-NMS of one class, as the compiled loop of the original does it: one box at a time.

   rows: num_boxes times x1, y1, x2, y2, score. The best box comes first. Each other box whose IoU
   with it exceeds iou_threshold has its score multiplied by 1 - IoU. Then the same with the rest.
   A box whose score falls below min_score is removed: the last box takes its position and is
   examined next. Return the number of boxes left. */
int soft_nms(float *rows, int num_boxes, float iou_threshold, float min_score)
{
    for (int first = 0; first < num_boxes; first++) {
        int best_index = first;
        for (int i = first + 1; i < num_boxes; i++)
            if (rows[5 * i + 4] > rows[5 * best_index + 4])
                best_index = i;
        for (int column = 0; column < 5; column++) {
            float value = rows[5 * first + column];
            rows[5 * first + column] = rows[5 * best_index + column];
            rows[5 * best_index + column] = value;
        }
        const float *best = rows + 5 * first;
        float best_area = (best[2] - best[0] + 1) * (best[3] - best[1] + 1);
        for (int i = first + 1; i < num_boxes;) {
            float *other = rows + 5 * i;
            float left = best[0] > other[0] ? best[0] : other[0];
            float top = best[1] > other[1] ? best[1] : other[1];
            float right = best[2] < other[2] ? best[2] : other[2];
            float bottom = best[3] < other[3] ? best[3] : other[3];
            float overlap_width = right - left + 1;
            float overlap_height = bottom - top + 1;
            if (overlap_width > 0 && overlap_height > 0) {
                float overlap = overlap_width * overlap_height;
                float other_area = (other[2] - other[0] + 1) * (other[3] - other[1] + 1);
                float iou = overlap / (best_area + other_area - overlap);
                if (iou > iou_threshold)
                    other[4] *= 1 - iou;
                if (other[4] < min_score) {
                    num_boxes--;
                    for (int column = 0; column < 5; column++)
                        other[column] = rows[5 * num_boxes + column];
                    continue;
                }
            }
            i++;
        }
    }
    return num_boxes;
}
