//! What an adapter has beyond what every kernel needs, and the asking for it.

/// Abilities that some kernels have forms for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// Operations across a subgroup.
    pub(crate) subgroups: bool,
    /// Threads of a subgroup, the least and the most.
    pub(crate) subgroup_sizes: (u32, u32),
    /// The side of the square blocks that matrix units multiply, f16 by f16 added up in f32.
    pub(crate) block: Option<u32>,
    /// It is the processor: few threads, and every read of shared memory is slow.
    pub(crate) software: bool,
}

impl Abilities {
    pub(crate) fn of(adapter: &wgpu::Adapter) -> Self {
        let (info, features) = (adapter.get_info(), adapter.features());
        let units = features
            .contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16);
        let blocks = adapter.cooperative_matrix_properties();
        // Four subgroups are a group.
        let units = units && (1..=64).contains(&info.subgroup_max_size);
        let offered = |side: u32| {
            blocks.iter().any(|b| {
                [b.m_size, b.n_size, b.k_size] == [side; 3]
                    && b.ab_type == wgpu::CooperativeScalarType::F16
                    && b.cr_type == wgpu::CooperativeScalarType::F32
                    && !b.saturating_accumulation
            })
        };
        Self {
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            subgroup_sizes: (info.subgroup_min_size, info.subgroup_max_size),
            block: [16, 8].into_iter().find(|side| units && offered(*side)),
            software: info.device_type == wgpu::DeviceType::Cpu,
        }
    }

    /// The features that a device is asked for.
    pub(crate) fn features(self) -> wgpu::Features {
        let mut all = wgpu::Features::IMMEDIATES;
        all.set(wgpu::Features::SUBGROUP, self.subgroups);
        let units = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16;
        all.set(units, self.block.is_some());
        all
    }

    /// Leave to use experimental features, where one is asked for.
    pub(crate) fn leave(self) -> wgpu::ExperimentalFeatures {
        if self.block.is_none() {
            return wgpu::ExperimentalFeatures::disabled();
        }
        // SAFETY: `wgpu` has no tool but this to say that features marked experimental may be unsound. The only one asked for
        // is cooperative matrices, and the only kernel that uses them is `wgsl/coop.wgsl`: it loads and stores blocks in
        // shared memory alone, at places that constants bound, and never a block of a buffer.
        #[allow(
            unsafe_code,
            reason = "the only way to use matrix units; see the comment above"
        )]
        unsafe {
            wgpu::ExperimentalFeatures::enabled()
        }
    }
}
