//! The second quantisation: scales in 8 bits.

use std::sync::OnceLock;

/// Scales that share a second scale.
const GROUP: usize = 256;

/// Scales less their mean in 8 bits of a dynamic map, in blocks of 256 with a scale of their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    /// A code for each scale.
    pub codes: Vec<u8>,
    /// Largest magnitude of each 256 scales less the offset.
    pub scales: Vec<f32>,
    /// The mean, taken out before.
    pub offset: f32,
    /// What the codes stand for, between -1 and 1.
    pub map: [f32; 256],
    /// Scales that share a second scale.
    pub blocksize: usize,
}

impl Nested {
    /// Quantises scales by bitsandbytes' own map: each to the nearest of its numbers, of two equally near to the lower.
    /// (Its CPU kernel finds the nearest on a grid of 2^16 and may take the other neighbour close to their middle.)
    pub fn quantize(scales: &[f32]) -> Self {
        let map = *dynamic_map();
        let sum: f64 = scales.iter().map(|s| f64::from(*s)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let mut codes = Vec::with_capacity(scales.len());
        let mut largest = Vec::with_capacity(scales.len().div_ceil(GROUP));
        for group in scales.chunks(GROUP) {
            let top = group.iter().fold(0.0f32, |a, s| a.max((s - offset).abs()));
            let inverse = if top == 0.0 { 0.0 } else { 1.0 / top };
            largest.push(top);
            codes.extend(group.iter().map(|s| nearest(&map, (s - offset) * inverse)));
        }
        Self {
            codes,
            scales: largest,
            offset,
            map,
            blocksize: GROUP,
        }
    }

    /// The scales as they come back.
    pub fn decode(&self) -> Vec<f32> {
        let group = self.blocksize.max(1);
        self.codes
            .chunks(group)
            .zip(&self.scales)
            .flat_map(|(codes, scale)| {
                codes
                    .iter()
                    .map(move |code| self.map[usize::from(*code)] * scale + self.offset)
            })
            .collect()
    }
}

fn nearest(map: &[f32; 256], v: f32) -> u8 {
    let above = map.partition_point(|m| *m < v).clamp(1, 255);
    let at = if map[above] - v < v - map[above - 1] {
        above
    } else {
        above - 1
    };
    at as u8
}

/// bitsandbytes' signed 8-bit dynamic map (arXiv 1511.04561; `create_dynamic_map`), sorted: for each power of ten from
/// 1e-6 to 1 the middles of 1, 2, 4, .. 64 equal parts of 0.1 to 1, with both signs, and 0 and 1.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = [0.0; 256];
        map[1] = 1.0;
        let mut at = 2;
        for exponent in 0..7u32 {
            let parts = 1usize << exponent;
            let power = 10f64.powi(exponent as i32 - 6) as f32;
            for i in 0..parts {
                let middle = (boundary(i, parts) + boundary(i + 1, parts)) / 2.0 * power;
                (map[at], map[at + 1]) = (middle, -middle);
                at += 2;
            }
        }
        map.sort_by(f32::total_cmp);
        map
    })
}

/// Boundary `i` of `parts` equal parts of 0.1 to 1, counted from the nearer end as `torch.linspace` does, to one unit in
/// the last place.
fn boundary(i: usize, parts: usize) -> f32 {
    let step = 0.9 / parts as f32;
    if i < parts.div_ceil(2) {
        0.1 + step * i as f32
    } else {
        1.0 - step * (parts - i) as f32
    }
}
