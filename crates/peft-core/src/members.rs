//! Methods inside of methods: what compositions need beyond [`Injector::capture`].

use serde_json::Value;

use crate::attach::Injector;
use crate::{
    Attach, Base, Common, Error, Param, PeftMethod, Result, Site, Tensors, builtin, entry_for,
};

/// Another adapter, by the reader the network was given, on the network's device.
pub(crate) fn read(base: &Base, path: &str) -> Result<(Value, Tensors)> {
    let Some(read) = base.reader() else {
        return Err(Error::other(
            "nothing was set up to read other adapters with",
        ));
    };
    let (config, tensors) = read(path)?;
    let tensors = tensors
        .into_iter()
        .map(|(key, value)| Ok((key, value.to_device(base.device())?)));
    Ok((config, tensors.collect::<Result<_>>()?))
}

impl<'a> Injector<'a> {
    /// Attaches another method from its own configuration, its keys behind `scope`.
    ///
    /// # Errors
    /// If the configuration is wrong or the method cannot be attached.
    pub fn member(&mut self, config: &Value, scope: &str) -> Result<Box<dyn PeftMethod>> {
        let inside = |e: Error| e.context(scope.trim_end_matches('.').to_owned());
        let parsed = entry_for(config)
            .and_then(|entry| (entry.parse)(config))
            .map_err(inside)?;
        let common = Common {
            finished: self.loading,
            ..Common::from_config(config).map_err(inside)?
        };
        let mut cx = self.inner(&common, scope, parsed.method.module_prefix());
        builtin::inject(&*parsed.method, &mut cx).map_err(inside)?;
        Ok(parsed.method)
    }

    /// As [`Injector::member`], none of its parameters ever trained.
    ///
    /// # Errors
    /// As [`Injector::member`].
    pub fn frozen_member(&mut self, config: &Value, scope: &str) -> Result<Box<dyn PeftMethod>> {
        let before = std::mem::replace(&mut self.frozen, true);
        let method = self.member(config, scope);
        self.frozen = before;
        method
    }

    /// Runs `f` with `scope` in front of the keys of what it makes.
    ///
    /// # Errors
    /// Whatever `f` returns.
    pub fn scoped<T>(
        &mut self,
        scope: &str,
        f: impl FnOnce(&mut Injector<'_>) -> Result<T>,
    ) -> Result<T> {
        f(&mut self.inner(self.common, scope, self.prefix))
    }

    /// Makes parameters at a site without placing an adapter there.
    pub fn at<'b>(&'b mut self, site: &'b Site) -> Attach<'b> {
        Attach { cx: self, site }
    }

    /// Another adapter's configuration (null for a bare file) and tensors, by its path.
    ///
    /// # Errors
    /// If the network was given nothing to read with, or the adapter cannot be read.
    pub fn adapter(&self, path: &str) -> Result<(Value, Tensors)> {
        read(self.base, path)
    }

    /// Gives a member that was attached behind `scope` the values of its own file.
    ///
    /// # Errors
    /// If keys are missing, unexpected or misshaped: all of them in one error.
    pub fn fill(&mut self, member: &dyn PeftMethod, scope: &str, tensors: Tensors) -> Result<()> {
        let mut tensors = member.load(tensors)?;
        let full = format!("{}{scope}", self.scope);
        let (mut missing, mut misshaped) = (Vec::new(), Vec::new());
        let own = |p: &&Param| p.is_saved() && p.key().starts_with(&full);
        for param in self.store.params.iter().filter(own) {
            let key = &param.key()[full.len()..];
            match tensors.remove(key) {
                None => missing.push(key.to_owned()),
                Some(t) if param.accepts(t.shape()) => param.set(t)?,
                Some(t) => misshaped.push(format!(
                    "{key}: {:?}, expected {:?}",
                    t.shape(),
                    param.shape()
                )),
            }
        }
        let unexpected: Vec<String> = tensors.into_keys().collect();
        if missing.is_empty() && misshaped.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        Err(Error::Load {
            what: scope.trim_end_matches('.').to_owned(),
            missing,
            unexpected,
            misshaped,
        })
    }

    fn inner<'b>(
        &'b mut self,
        common: &'b Common,
        scope: &str,
        prefix: &'static str,
    ) -> Injector<'b> {
        Injector {
            base: self.base,
            common,
            store: self.store,
            key: self.key.fork(scope),
            scope: format!("{}{scope}", self.scope),
            prefix,
            frozen: self.frozen,
            loading: self.loading,
        }
    }
}
